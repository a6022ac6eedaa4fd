"""Fixed priority by input length, of the paper's ablation."""

from __future__ import annotations

from fastserve.core.request import Request
from fastserve.scheduler import Policy, PreemptiveOptions, register


@register
class FixedPriority(Policy):
    """The shorter the prompt, the more urgent, from arrival to the end; a more urgent request preempts at once.

    Right when long prompts mean long jobs. Where the output decides, it is arbitrary, and long prompts starve.
    """

    name = "fixed-priority"
    Options = PreemptiveOptions
    max_passed_over = 16

    def on_add(self, request: Request) -> None:
        """Join the queue of its prompt length, for good."""
        self.queue.join(request, request.num_prompt_tokens)

"""Fixed priority by input length, of the paper's ablation."""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.request import Request
from fastserve.scheduler import MemoryOptions, Scheduler, SwapMode, register


@dataclass(frozen=True, slots=True)
class FixedPriorityOptions(MemoryOptions):
    """On FastServe's engine, with its swapping."""

    swap: SwapMode = "proactive"


@register
class FixedPriority(Scheduler):
    """The shorter the prompt, the more urgent, from arrival to the end; a more urgent request preempts at once.

    Right when long prompts mean long jobs. Where the output decides, it is arbitrary, and long prompts starve.
    """

    name = "fixed-priority"
    Options = FixedPriorityOptions
    max_passed_over = 16

    def on_add(self, request: Request) -> None:
        """Join the queue of its prompt length, for good."""
        self.queue.join(request, request.num_prompt_tokens)

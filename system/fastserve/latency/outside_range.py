"""What is said of a run that left the range its profile was measured in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_REACHED = {
    "iteration_tokens": "iterations of {:,} tokens",
    "prompt_tokens": "prompts of {:,} tokens",
    "decodes": "{:,} decodes at a time",
    "context_tokens": "contexts of {:,} tokens",
}
_REMEDIES = {
    "iteration_tokens": "a token_budget of less than {:,}",
    "prompt_tokens": "requests of at most {:,} tokens",
    "decodes": "a max_batch_size of at most {:,}",
    "context_tokens": "requests of at most {:,} tokens",
}


@dataclass(frozen=True, slots=True)
class OutsideRange:
    """How much of a run's computed time is of iterations outside the range, and how far they lie outside."""

    share: float
    """From 0 to 1."""
    bounds_left: Mapping[str, Mapping[str, int]]
    """Of each bound that was left, by its name in MeasuredRange: `measured`, the bound, and `reached`, the largest."""

    def warning(self, profile: str) -> str:
        """One line: how much of the time, which bounds, how far, and what to do; empty if no iteration was outside."""
        if not self.bounds_left:
            return ""
        reached = [
            f"{_REACHED[name].format(bound['reached'])} (range to {bound['measured']:,})"
            for name, bound in self.bounds_left.items()
        ]
        limits: dict[str, int] = {}
        for name, bound in self.bounds_left.items():
            remedy = _REMEDIES[name]
            limits[remedy] = min(bound["measured"], limits.get(remedy, bound["measured"]))
        remedies = [remedy.format(limit) for remedy, limit in limits.items()]
        return (
            f"{as_percent(self.share)} of the computed time lies outside the range that profile {profile} holds for, "
            f"and is extrapolated: {', '.join(reached)}; take a profile with a larger range (`fastbench profiles` "
            f"shows them), or {' and '.join(remedies)}"
        )


def as_percent(share: float) -> str:
    """A share, such as `12 %`; a small one is not 0 %, and one just below 1 not 100 %."""
    if 0 < share < 0.001:
        return "less than 0.1 %"
    if share < 0.1:
        return f"{100 * share:.1f} %"
    return f"{100 * (share if share >= 1 else min(share, 0.99)):.0f} %"

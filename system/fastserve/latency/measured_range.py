"""The range of iterations in which a profile's times were measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from fastserve.core.checks import require_int


@dataclass(frozen=True, slots=True)
class MeasuredRange:
    """Bounds of the iterations that were measured; None where the source does not say. Beyond them times are guesses.

    ConfigError for a bound below 1.
    """

    iteration_tokens: int | None = None
    """Most tokens that an iteration computes, of prompts and decodes."""
    prompt_tokens: int | None = None
    """Longest prompt, or chunk with the prefix before it."""
    decodes: int | None = None
    """Most decodes in an iteration."""
    context_tokens: int | None = None
    """Longest context of a decode."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if (bound := getattr(self, field.name)) is not None:
                require_int(f"range.{field.name}", bound, 1)

    @classmethod
    def spanned(cls, shapes: Iterable[tuple[Sequence[int], Sequence[int]]]) -> MeasuredRange:
        """The range of measured iterations, each given as its prompts (tokens each) and the contexts of its decodes."""
        shapes = list(shapes)
        return cls(
            iteration_tokens=max(sum(prompts) + len(contexts) for prompts, contexts in shapes),
            prompt_tokens=max((length for prompts, _ in shapes for length in prompts), default=None),
            decodes=max(len(contexts) for _, contexts in shapes) or None,
            context_tokens=max((length for _, contexts in shapes for length in contexts), default=None),
        )

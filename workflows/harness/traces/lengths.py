"""What a source of request lengths is, the artifact's filter on lengths, and the statistics that describe them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


class LengthSource(Protocol):
    """Prompt and output lengths, in tokens, to draw requests from."""

    @property
    def description(self) -> str:
        """What the lengths are and how they were obtained, for meta.json."""

    def sample(self, n: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        """Draw `n` (prompt, output) lengths; more from the same seed begin with the same `n`."""


@dataclass(frozen=True)
class LengthFilter:
    """Bounds, in tokens and inclusive, outside which a request is dropped."""

    min_prompt: int
    min_output: int
    max_prompt: int
    max_total: int

    def keeps(self, prompt: IntArray, output: IntArray) -> NDArray[np.bool_]:
        """Mark the requests within bounds."""
        return (
            (prompt >= self.min_prompt)
            & (output >= self.min_output)
            & (prompt <= self.max_prompt)
            & (prompt + output <= self.max_total)
        )


ARTIFACT_FILTER = LengthFilter(min_prompt=4, min_output=4, max_prompt=1024, max_total=2048)


@dataclass(frozen=True, eq=False)
class RecordedLengths:
    """Requests of a file, in its order; `arrival_s` (seconds, never decreasing) where the file has timestamps."""

    description: str
    prompt_tokens: IntArray
    output_tokens: IntArray
    arrival_s: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def sample(self, n: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        """Draw `n` requests with replacement."""
        chosen = rng.integers(len(self), size=n)
        return self.prompt_tokens[chosen], self.output_tokens[chosen]


def length_statistics(prompt: IntArray, output: IntArray) -> dict[str, float]:
    """Summarise lengths; the mean of 1/output matters because normalized latency divides by the output length."""
    return {
        "mean_prompt": float(prompt.mean()),
        "mean_output": float(output.mean()),
        "std_prompt": float(prompt.std()),
        "std_output": float(output.std()),
        "mean_inverse_output": float((1 / output).mean()),
        "correlation": float(np.corrcoef(prompt, output)[0, 1]),
    }

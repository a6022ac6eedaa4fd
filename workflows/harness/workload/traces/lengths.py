"""Sources of request lengths, the artifact's filter on lengths, and statistics of lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fastserve.core.errors import TraceError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


class LengthSource(Protocol):
    """A distribution of prompt and output lengths, in tokens."""

    @property
    def description(self) -> str:
        """The lengths and their origin in words, for meta.json."""

    def sample(self, n: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        """Draw `n` prompt and output lengths, [n] each. A longer draw from the same seed begins with the same `n`."""


@dataclass(frozen=True)
class LengthFilter:
    """Inclusive bounds in tokens; a request outside them is dropped, and so is one with nothing to read or to write."""

    min_prompt: int
    min_output: int
    max_prompt: int
    max_total: int
    minima: str = "or"
    """How the minima apply: "or" drops a request if either length is below its minimum, "and" only if both are."""

    def keeps(self, prompt: IntArray, output: IntArray) -> NDArray[np.bool_]:
        """Mark the requests within the bounds, in the shape that the two arrays broadcast to."""
        long_prompt, long_output = prompt >= self.min_prompt, output >= self.min_output
        long_enough = long_prompt | long_output if self.minima == "and" else long_prompt & long_output
        not_empty = (prompt >= 1) & (output >= 1)
        kept: NDArray[np.bool_] = (
            long_enough & not_empty & (prompt <= self.max_prompt) & (prompt + output <= self.max_total)
        )
        return kept

    @property
    def rule(self) -> str:
        """The bounds in words."""
        return (
            f"dropped if the prompt is below {self.min_prompt} {self.minima} the output below {self.min_output}, "
            f"if the prompt is above {self.max_prompt:,}, or if both together are above {self.max_total:,}"
        )


ARTIFACT_FILTER = LengthFilter(min_prompt=4, min_output=4, max_prompt=1024, max_total=2048, minima="and")
"""The filter of the artifact's benchmark script, which keeps answers of one token (benchmark-serving.py)."""
CLIENT_FILTER = replace(ARTIFACT_FILTER, minima="or")
"""The filter of vLLM's benchmark client, and of the artifact's throughput script."""


class Columns(NamedTuple):
    """Requests of a file, [n] each: lengths in tokens, arrivals in seconds on the file's own time axis."""

    prompt: IntArray
    output: IntArray
    arrival_s: FloatArray | None


@dataclass(frozen=True, eq=False)
class RecordedLengths:
    """Requests of a file, in the file's order; read-only arrays, in tokens and seconds.

    `arrival_s`, if the file has timestamps, is on the file's own time axis and in any order.
    """

    description: str
    prompt_tokens: IntArray
    output_tokens: IntArray
    arrival_s: FloatArray | None = None
    time_unit: str = "seconds"
    """The unit in which the file's timestamps were read."""
    locate: Callable[[int], str] = "request {} (from 0)".format
    """Gives the file and line of a request by its index."""

    def __post_init__(self) -> None:
        for array in (self.prompt_tokens, self.output_tokens, self.arrival_s):
            if array is not None:
                array.setflags(write=False)

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def sample(self, n: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        """Draw `n` requests with replacement."""
        chosen = rng.integers(len(self), size=n)
        return self.prompt_tokens[chosen], self.output_tokens[chosen]

    def first(self, n: int) -> RecordedLengths:
        """The first `n` requests of the file, or all if there are fewer."""
        arrival_s = None if self.arrival_s is None else self.arrival_s[:n]
        return replace(
            self, prompt_tokens=self.prompt_tokens[:n], output_tokens=self.output_tokens[:n], arrival_s=arrival_s
        )

    def check_order(self) -> None:
        """Raise TraceError, naming the line, if a request arrives before the request above it."""
        if self.arrival_s is None:
            return
        gaps = np.diff(self.arrival_s)
        if (gaps < 0).any():
            at = int(np.argmax(gaps < 0))
            raise TraceError(
                f"{self.locate(at + 1)}: it arrives {-gaps[at]:g} s before the request above it; trace arrivals need "
                "lines in order of time"
            )


def length_statistics(prompt: IntArray, output: IntArray) -> dict[str, float]:
    """Summarise lengths. The mean of 1/output matters because normalized latency divides by the output length."""
    return {
        "mean_prompt": float(prompt.mean()),
        "mean_output": float(output.mean()),
        "std_prompt": float(prompt.std()),
        "std_output": float(output.std()),
        "mean_inverse_output": float((1 / output).mean()),
        "correlation": float(np.corrcoef(prompt, output)[0, 1]),
    }

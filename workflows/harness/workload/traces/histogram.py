"""Lengths drawn from a histogram of real requests: the shipped tables, and other weights or scales of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from fastserve.core.errors import ConfigError, TraceError
from harness.workload.traces.lengths import FloatArray, IntArray, LengthFilter, LengthSource

TABLES = files("harness.workload.traces") / "tables"
"""The shipped tables, which tools/build_trace_tables.py makes; data of the package."""
_WEIGHT_OF_ALL = 10**12


def read_table(name: str) -> dict[str, Any]:
    """Read a shipped table by its file's stem. Raises TraceError if it is missing or malformed."""
    path = TABLES / f"{name}.json"
    try:
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TraceError(
            f"{path}: the table of a built-in trace could not be read ({error}); install the package again"
        ) from error
    return table


@dataclass(frozen=True, eq=False)
class HistogramLengths:
    """A histogram over prompt × output: a bin is drawn by its count, then uniform integers inside the bin.

    Rows of `lowest` and `highest` [bins, 2] are the inclusive (prompt, output) corners of the occupied bins, in tokens.
    """

    description: str
    lowest: IntArray
    highest: IntArray
    counts: IntArray
    limits: LengthFilter | None = None

    @classmethod
    def from_table(cls, table: dict[str, Any]) -> HistogramLengths:
        """Make it from a table that tools/build_trace_tables.py wrote."""
        prompt_edges, output_edges = np.array(table["prompt_edges"]), np.array(table["output_edges"])
        prompt_bin, output_bin, counts = np.array(table["bins"], dtype=np.int64).T
        return cls(
            description=table["description"],
            lowest=np.stack([prompt_edges[prompt_bin], output_edges[output_bin]], axis=1),
            highest=np.stack([prompt_edges[prompt_bin + 1], output_edges[output_bin + 1]], axis=1) - 1,
            counts=counts,
            limits=LengthFilter(**table["filter"]) if table["filter"] else None,
        )

    def sample(self, n: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        """Draw `n` requests, all within the filter that the table was made with."""
        draws = rng.random((n, 3))
        ends = np.cumsum(self.counts)
        chosen = np.searchsorted(ends, (draws[:, 0] * ends[-1]).astype(np.int64), side="right")
        (prompt_low, output_low), (prompt_high, output_high) = self.lowest[chosen].T, self.highest[chosen].T
        if self.limits:
            prompt_high = np.minimum(prompt_high, self.limits.max_total - output_low)
        prompt = _uniform(prompt_low, prompt_high, draws[:, 1])
        if self.limits:
            output_high = np.minimum(output_high, self.limits.max_total - prompt)
        return prompt, _uniform(output_low, output_high, draws[:, 2])

    def reweighted(self, **means: float) -> HistogramLengths:
        """Reweight the bins to these means (`prompt`, `output`, `inverse_output`) with the least change.

        The change is measured by relative entropy; at its minimum, a weight is exponential in the bin's own means.
        Raises ConfigError if no weights have these means.
        """
        from scipy.optimize import root  # Slow to import, and most traces do not need it.

        averages = {
            "prompt": (self.lowest[:, 0] + self.highest[:, 0]) / 2,
            "output": (self.lowest[:, 1] + self.highest[:, 1]) / 2,
            "inverse_output": np.array(
                [
                    (1 / np.arange(low, high + 1)).mean()
                    for low, high in zip(self.lowest[:, 1], self.highest[:, 1], strict=True)
                ]
            ),
        }
        features = np.stack([averages[name] / mean for name, mean in means.items()], axis=1)

        def weights(multipliers: FloatArray) -> FloatArray:
            exponents = features @ multipliers
            weight: FloatArray = self.counts * np.exp(exponents - exponents.max())
            return weight / weight.sum()

        solution = root(lambda multipliers: weights(multipliers) @ features - 1, np.zeros(len(means)))
        if not solution.success:
            wanted = ", ".join(f"{name}={mean:g}" for name, mean in means.items())
            raise ConfigError(f"no weights of the histogram's bins have the means {wanted}; take others")
        changed = ", ".join(f"mean {name.replace('_', ' ')} {mean:g}" for name, mean in means.items())
        return HistogramLengths(
            description=f"{self.description}; bins reweighted to {changed}",
            lowest=self.lowest,
            highest=self.highest,
            counts=np.rint(weights(solution.x) * _WEIGHT_OF_ALL).astype(np.int64),
            limits=self.limits,
        )


@dataclass(frozen=True)
class ScaledLengths:
    """Lengths of another source, with one factor for prompts and one for outputs, kept within a filter."""

    description: str
    source: LengthSource
    prompt_factor: float
    output_factor: float
    limits: LengthFilter

    def sample(self, n: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        """Draw `n` requests of the source and scale them."""
        prompt, output = self.source.sample(n, rng)
        limits = self.limits
        prompt = np.clip(np.rint(prompt * self.prompt_factor).astype(np.int64), limits.min_prompt, limits.max_prompt)
        output = np.maximum(np.rint(output * self.output_factor).astype(np.int64), limits.min_output)
        return prompt, np.minimum(output, limits.max_total - prompt)


def _uniform(low: IntArray, high: IntArray, draws: FloatArray) -> IntArray:
    return low + (draws * (high - low + 1)).astype(np.int64)

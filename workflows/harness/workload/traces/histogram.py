"""Lengths drawn from a histogram of real requests: the shipped tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from fastserve.core.errors import TraceError
from harness.workload.traces.lengths import FloatArray, IntArray, LengthFilter

TABLES = files("harness.workload.traces") / "tables"
"""The shipped tables, which tools/build_trace_tables.py makes; data of the package."""


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


def _uniform(low: IntArray, high: IntArray, draws: FloatArray) -> IntArray:
    return low + (draws * (high - low + 1)).astype(np.int64)

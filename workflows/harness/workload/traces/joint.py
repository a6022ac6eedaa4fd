"""Lengths drawn from a joint distribution that is known for every pair of lengths."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from harness.workload.traces.lengths import FloatArray, IntArray, LengthFilter


@dataclass(frozen=True, eq=False)
class JointLengths:
    """A joint distribution of prompt and output lengths; one uniform draw makes one request.

    Row i and column j of `weights` [prompts, outputs] belong to i + 1 prompt and j + 1 output tokens. The weights need
    not add up to 1.
    """

    description: str
    weights: FloatArray

    @cached_property
    def _cumulative(self) -> FloatArray:
        """Cumulative weights over the flattened pairs, [prompts * outputs]."""
        cumulative: FloatArray = np.cumsum(self.weights)
        return cumulative

    def sample(self, n: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        """Draw `n` requests."""
        cumulative = self._cumulative
        pairs = np.searchsorted(cumulative, rng.random(n) * cumulative[-1], side="right")
        # A draw just below 1 may round up to the sum of all weights, where the last pair with a weight ends.
        pairs = np.minimum(pairs, np.searchsorted(cumulative, cumulative[-1]))
        prompt, output = np.unravel_index(pairs, self.weights.shape)
        return prompt.astype(np.int64) + 1, output.astype(np.int64) + 1

    def statistics(self) -> dict[str, float]:
        """The exact values to which `length_statistics` of a sample tends."""
        prompt, output = (np.arange(1, size + 1) for size in self.weights.shape)
        weights = self.weights / self.weights.sum()
        of_prompt, of_output = weights.sum(axis=1), weights.sum(axis=0)
        mean_prompt, mean_output = of_prompt @ prompt, of_output @ output
        std_prompt = np.sqrt(of_prompt @ prompt**2 - mean_prompt**2)
        std_output = np.sqrt(of_output @ output**2 - mean_output**2)
        return {
            "mean_prompt": float(mean_prompt),
            "mean_output": float(mean_output),
            "std_prompt": float(std_prompt),
            "std_output": float(std_output),
            "mean_inverse_output": float(of_output @ (1 / output)),
            "correlation": float((prompt @ weights @ output - mean_prompt * mean_output) / (std_prompt * std_output)),
        }


def filtered(weights: FloatArray, limits: LengthFilter) -> FloatArray:
    """Cut `weights` [prompts, outputs] to the largest lengths of a filter and set the pairs that it drops to 0."""
    weights = weights[: limits.max_prompt, : limits.max_total - 1]
    prompt, output = (np.arange(1, size + 1) for size in weights.shape)
    return np.where(limits.keeps(prompt[:, None], output[None, :]), weights, 0.0)

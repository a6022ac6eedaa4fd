"""Synthetic lengths: distributions with parameters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness.workload.traces.lengths import FloatArray, IntArray, LengthFilter

LONGEST = 1_000_000
"""Upper bound on a synthetic length, in tokens."""


@dataclass(frozen=True)
class GeometricLengths:
    """Independent geometric lengths above the filter's minima: the greatest entropy with these means."""

    description: str
    mean_prompt: float
    mean_output: float
    limits: LengthFilter

    def sample(self, n: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        """Draw `n` requests; clip at the filter's maxima, which lie far out in the tails."""
        draws, limits = rng.random((n, 2)), self.limits
        prompt = _geometric(limits.min_prompt, self.mean_prompt, draws[:, 0])
        prompt = np.minimum(prompt, limits.max_prompt)
        output = _geometric(limits.min_output, self.mean_output, draws[:, 1])
        return prompt, np.minimum(output, limits.max_total - prompt)


@dataclass(frozen=True)
class ZipfLengths:
    """Lengths L in [`minimum`, `maximum`] with probability proportional to L^-theta; theta 0 is uniform.

    Prompt and output are drawn independently. With a `ratio`, their sum is drawn and split prompt : output = ratio : 1.
    With `independent` too, the prompt comes from one such sum and the output from another: the lengths keep their
    distribution, but a prompt says nothing about its output.
    """

    theta: float
    minimum: int
    maximum: int
    ratio: float = 0.0
    independent: bool = False

    @property
    def description(self) -> str:
        """The distribution in words."""
        what = f"their sum split prompt:output = {self.ratio:g}:1" if self.ratio else "prompt and output independent"
        if self.ratio and self.independent:
            what += ", each from a sum of its own"
        return f"zipf: lengths L in [{self.minimum}, {self.maximum}] with P(L) ~ L^-{self.theta:g}, {what}"

    def sample(self, n: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        """Draw `n` requests."""
        # Relative to the minimum, so that a large theta cannot underflow every weight to zero.
        weights = (np.arange(self.minimum, self.maximum + 1) / self.minimum) ** -self.theta
        cumulative = np.cumsum(weights)
        draws = rng.random((n, 2)) * cumulative[-1]
        lengths = self.minimum + np.minimum(np.searchsorted(cumulative, draws, side="right"), len(weights) - 1)
        if not self.ratio:
            return lengths[:, 0], lengths[:, 1]
        prompts = np.clip(np.rint(lengths * self.ratio / (1 + self.ratio)).astype(np.int64), 1, lengths - 1)
        sums = lengths[:, 1] if self.independent else lengths[:, 0]
        return prompts[:, 0], sums - (prompts[:, 1] if self.independent else prompts[:, 0])


@dataclass(frozen=True)
class FixedLengths:
    """Every request has the same lengths."""

    prompt: int
    output: int

    @property
    def description(self) -> str:
        """The lengths in words."""
        return f"fixed: {self.prompt} prompt tokens, {self.output} output tokens"

    def sample(self, n: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        """Repeat the lengths `n` times."""
        return np.full(n, self.prompt, dtype=np.int64), np.full(n, self.output, dtype=np.int64)


@dataclass(frozen=True)
class BimodalLengths:
    """Outputs of two kinds: short with probability `share`, else long; prompts are independent of them.

    Each kind is gamma-distributed with its own mean (tokens) and the coefficient of variation `cv`, rounded, and at
    least 1 token. Prompts are geometric from 1 token up.
    """

    mean_prompt: float
    mean_short: float
    mean_long: float
    share: float
    cv: float

    @property
    def description(self) -> str:
        """The distribution in words."""
        return (
            f"bimodal: answers of mean {self.mean_short:g} with probability {self.share:g}, else {self.mean_long:g}, "
            f"each gamma with cv {self.cv:g}; prompts independent, geometric with mean {self.mean_prompt:g}"
        )

    def sample(self, n: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        """Draw `n` requests by quantiles: a gamma sampler would take a varying number of draws."""
        from scipy.stats import gamma  # Slow to import, and most traces do not need it.

        draws = rng.random((n, 3))
        mean = np.where(draws[:, 1] < self.share, self.mean_short, self.mean_long)
        shape = self.cv**-2
        output = np.rint(mean * gamma.ppf(draws[:, 2], shape, scale=1 / shape))
        return _geometric(1, self.mean_prompt, draws[:, 0]), np.clip(output, 1, LONGEST).astype(np.int64)


def _geometric(minimum: int, mean: float, draws: FloatArray) -> IntArray:
    stop = 1 / (mean - minimum + 1)
    with np.errstate(divide="ignore"):  # If the mean is the minimum, the divisor is -inf and every length the minimum.
        return minimum + np.floor(np.log1p(-draws) / np.log1p(-stop)).astype(np.int64)

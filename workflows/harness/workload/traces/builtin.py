"""Traces that need no download: shipped tables of real data sets, and synthetic lengths.

Every source turns a fixed number of uniform draws into one request, so that a longer workload extends a shorter one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from fastserve.core.errors import ConfigError, TraceError
from harness.workload.options import parse_options
from harness.workload.traces.lengths import FloatArray, IntArray, LengthFilter, LengthSource

TABLES = files("harness.workload.traces") / "tables"
"""The shipped tables: data of the package, which traces/build_tables.py makes."""
_LONGEST = 1_000_000
_WEIGHT_OF_ALL = 10**12
_LEAST_CV, _MOST_CV = 0.001, 100.0
"""Coefficients of variation: beyond these, rounding and `_LONGEST` leave hardly anything of the distribution."""


@dataclass(frozen=True, eq=False)
class HistogramLengths:
    """A histogram over prompt × output: a bin by its count, then uniform integers inside it.

    Rows of `lowest` and `highest` are the inclusive (prompt, output) corners of the occupied bins.
    """

    description: str
    lowest: IntArray
    highest: IntArray
    counts: IntArray
    limits: LengthFilter | None = None

    @classmethod
    def from_table(cls, table: dict[str, Any]) -> HistogramLengths:
        """Build from a table that traces/build_tables.py wrote."""
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
        """Draw `n` requests, all within the filter the table was made with."""
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
        """The bins weighted as little otherwise as these means allow: `prompt`, `output`, `inverse_output`.

        Least change is smallest relative entropy, which makes a weight exponential in the bin's own means.
        Raises ConfigError if no weights have these means.
        """
        from scipy.optimize import root

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
    """Another source's lengths, prompts and outputs each multiplied by a factor of its own, kept within a filter."""

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


@dataclass(frozen=True)
class GeometricLengths:
    """Independent geometric lengths above the filter's minima: maximum entropy for means that are known."""

    description: str
    mean_prompt: float
    mean_output: float
    limits: LengthFilter

    def sample(self, n: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        """Draw `n` requests; the filter's maxima, far beyond the tails, are kept by clipping."""
        draws, limits = rng.random((n, 2)), self.limits
        prompt = _geometric(limits.min_prompt, self.mean_prompt, draws[:, 0])
        prompt = np.minimum(prompt, limits.max_prompt)
        output = _geometric(limits.min_output, self.mean_output, draws[:, 1])
        return prompt, np.minimum(output, limits.max_total - prompt)


@dataclass(frozen=True)
class ZipfLengths:
    """Lengths L in [`minimum`, `maximum`] with probability proportional to L^-theta; theta 0 is uniform.

    Prompt and output are drawn independently; with a `ratio`, the sum is drawn and split prompt : output = ratio : 1.
    Where that is `independent`, the prompt is split from one such sum and the output from another: the same lengths,
    but a prompt says nothing about its output.
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
    """Every request alike."""

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
    """Answers of two kinds: short with probability `share`, else long; prompts say nothing about them.

    Each kind is gamma-distributed with a mean of its own (tokens) and the coefficient of variation `cv`, rounded to at
    least 1 token; prompts are geometric from 1 token on.
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
        """Draw `n` requests; by quantiles, since a gamma sampler takes as many draws as it needs."""
        from scipy.stats import gamma

        draws = rng.random((n, 3))
        mean = np.where(draws[:, 1] < self.share, self.mean_short, self.mean_long)
        shape = self.cv**-2
        output = np.rint(mean * gamma.ppf(draws[:, 2], shape, scale=1 / shape))
        return _geometric(1, self.mean_prompt, draws[:, 0]), np.clip(output, 1, _LONGEST).astype(np.int64)


def _uniform(low: IntArray, high: IntArray, draws: FloatArray) -> IntArray:
    return low + (draws * (high - low + 1)).astype(np.int64)


def _geometric(minimum: int, mean: float, draws: FloatArray) -> IntArray:
    stop = 1 / (mean - minimum + 1)
    with np.errstate(divide="ignore"):  # A mean of the minimum stops at once: over a logarithm of 0, all is 0.
        return minimum + np.floor(np.log1p(-draws) / np.log1p(-stop)).astype(np.int64)


def read_table(name: str) -> dict[str, Any]:
    """Read a shipped table by its file's stem. Raises TraceError if it is not there."""
    path = TABLES / f"{name}.json"
    try:
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TraceError(
            f"{path}: the table of a built-in trace could not be read ({error}); install the package again"
        ) from error
    return table


def _histogram(stem: str) -> Callable[[str], LengthSource]:
    def open_table(options: str) -> LengthSource:
        parse_options(f"trace {stem.replace('_', '-')!r}", options, {})
        return HistogramLengths.from_table(read_table(stem))

    return open_table


SHAREGPT_FILTERED_MEANS = (228.0, 196.0)
"""ShareGPT's mean prompt and output under the filter that the artifact shares with vLLM's benchmark client (two turns,
at least 4 tokens each, prompt up to 1024, both up to 2048), from logs of that client: 229.7 and 203.1 over 1,000
requests (vllm-project/vllm, pull request 18566), 226.8 and 188.2 over 2,000 (sgl-project/sglang, issue 1639)."""


@cache
def _sharegpt_filtered(options: str) -> LengthSource:
    parse_options("trace 'sharegpt-filtered'", options, {})
    prompt, output = SHAREGPT_FILTERED_MEANS
    return HistogramLengths.from_table(read_table("sharegpt")).reweighted(prompt=prompt, output=output)


@cache
def _sharegpt_reweighted(options: str) -> LengthSource:
    owner = "trace 'sharegpt-reweighted'"
    values = parse_options(owner, options, {"prompt": 0.0, "output": 0.0, "inverse_output": 0.0})
    means = {name: mean for name, mean in values.items() if mean}
    if not means or min(means.values()) < 0:
        raise ConfigError(f"{owner} needs a mean above 0 for one of {', '.join(values)}, as in output=200")
    return HistogramLengths.from_table(read_table("sharegpt")).reweighted(**means)


SHAREGPT_PUBLISHED_MEANS = (161.0, 338.0)
"""ShareGPT's mean prompt and output in tokens as vLLM's paper gives them (Kwon et al., SOSP'23, figure 11)."""


def _sharegpt_published(options: str) -> LengthSource:
    parse_options("trace 'sharegpt-published'", options, {})
    table = read_table("sharegpt")
    prompt_mean, output_mean = SHAREGPT_PUBLISHED_MEANS
    return ScaledLengths(
        description=f"{table['description']}; scaled to the published means, {prompt_mean:g} in, {output_mean:g} out",
        source=HistogramLengths.from_table(table),
        prompt_factor=prompt_mean / table["statistics"]["mean_prompt"],
        output_factor=output_mean / table["statistics"]["mean_output"],
        limits=LengthFilter(**table["filter"]),
    )


def _alpaca(options: str) -> LengthSource:
    parse_options("trace 'alpaca'", options, {})
    table = read_table("alpaca")
    parameters = table["parameters"]
    return GeometricLengths(
        description=table["description"],
        mean_prompt=parameters["mean_prompt"],
        mean_output=parameters["mean_output"],
        limits=LengthFilter(**table["filter"]),
    )


def _zipf(options: str) -> LengthSource:
    values = parse_options(
        "trace 'zipf'", options, {"theta": 1.0, "min": 4, "max": 1024, "ratio": 0.0, "independent": 0}
    )
    theta, minimum, maximum, ratio = values["theta"], int(values["min"]), int(values["max"]), values["ratio"]
    if theta < 0 or ratio < 0:
        raise ConfigError(f"trace 'zipf': theta and ratio must be at least 0, not theta={theta:g}, ratio={ratio:g}")
    lowest = 2 if ratio else 1
    if not lowest <= minimum <= maximum <= _LONGEST:
        raise ConfigError(f"trace 'zipf': need {lowest} <= min <= max <= {_LONGEST}, not min={minimum}, max={maximum}")
    return ZipfLengths(theta, minimum, maximum, ratio, bool(values["independent"]))


def _fixed(options: str) -> LengthSource:
    values = parse_options("trace 'fixed'", options, {"prompt": 128, "output": 64})
    for key, value in values.items():
        if not 1 <= value <= _LONGEST:
            raise ConfigError(f"trace 'fixed': {key} must be 1 to {_LONGEST} tokens, not {value}")
    return FixedLengths(int(values["prompt"]), int(values["output"]))


def _bimodal(options: str) -> LengthSource:
    owner = "trace 'bimodal'"
    defaults = {"prompt": 64.0, "short": 32.0, "long": 512.0, "share": 0.5, "cv": 0.3}
    values = parse_options(owner, options, defaults)
    for key in ("prompt", "short", "long"):
        if not 1 <= values[key] <= _LONGEST:
            raise ConfigError(f"{owner}: the mean {key} must be 1 to {_LONGEST} tokens, not {values[key]:g}")
    if not 0 <= values["share"] <= 1:
        raise ConfigError(f"{owner}: share, the probability of a short answer, must be 0 to 1, not {values['share']:g}")
    if not _LEAST_CV <= values["cv"] <= _MOST_CV:
        raise ConfigError(f"{owner}: cv must be {_LEAST_CV:g} to {_MOST_CV:g}, not {values['cv']:g}")
    return BimodalLengths(values["prompt"], values["short"], values["long"], values["share"], values["cv"])


@dataclass(frozen=True)
class Builtin:
    """How a built-in trace is written, what it is, and how its options text opens it."""

    usage: str
    description: str
    open: Callable[[str], LengthSource]


BUILTIN = {
    "sharegpt": Builtin("sharegpt", "ShareGPT first turns, from a shipped histogram", _histogram("sharegpt")),
    "sharegpt-published": Builtin(
        "sharegpt-published",
        "the same, scaled to ShareGPT's published means of 161 in and 338 out",
        _sharegpt_published,
    ),
    "sharegpt-filtered": Builtin(
        "sharegpt-filtered",
        "the same, reweighted to ShareGPT's means under the artifact's filter, 228 in and 196 out",
        _sharegpt_filtered,
    ),
    "sharegpt-reweighted": Builtin(
        "sharegpt-reweighted:prompt=,output=,inverse_output=",
        "the same, reweighted as little as possible to the means given",
        _sharegpt_reweighted,
    ),
    "alpaca": Builtin("alpaca", "Alpaca, geometric lengths with the published means of 19 in and 58 out", _alpaca),
    "azure-conv": Builtin("azure-conv", "Azure 2023 conversations, from a shipped histogram", _histogram("azure_conv")),
    "zipf": Builtin(
        "zipf[:theta=1.0,min=4,max=1024,ratio=0,independent=0]",
        "Zipf lengths; a ratio above 0 draws prompt + output and splits it ratio:1, independent=1 each from its own",
        _zipf,
    ),
    "bimodal": Builtin(
        "bimodal[:prompt=64,short=32,long=512,share=0.5,cv=0.3]",
        "answers short with probability share, else long, each gamma with that mean and cv; geometric prompts",
        _bimodal,
    ),
    "fixed": Builtin("fixed[:prompt=128,output=64]", "every request alike", _fixed),
}

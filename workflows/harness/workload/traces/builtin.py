"""The built-in traces, which need no download: their names, their options, and how each is opened.

Every source turns a fixed number of uniform draws into one request, so that a longer workload extends a shorter one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastserve.core.errors import ConfigError
from harness.workload.options import parse_options
from harness.workload.traces.histogram import HistogramLengths, read_table
from harness.workload.traces.lengths import LengthFilter, LengthSource
from harness.workload.traces.measured import KIND, open_measured
from harness.workload.traces.sharegpt import CLIENT_SHARE, FITTED_SHARE, open_client, open_first_turns
from harness.workload.traces.synthetic import LONGEST, BimodalLengths, FixedLengths, GeometricLengths, ZipfLengths

_LEAST_CV, _MOST_CV = 0.001, 100.0
"""Bounds on a coefficient of variation: beyond them, rounding and `LONGEST` leave little of the distribution."""


def _histogram(stem: str) -> Callable[[str], LengthSource]:
    def open_table(options: str) -> LengthSource:
        parse_options(f"trace {stem.replace('_', '-')!r}", options, {})
        return HistogramLengths.from_table(read_table(stem))

    return open_table


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
    if not lowest <= minimum <= maximum <= LONGEST:
        raise ConfigError(f"trace 'zipf': need {lowest} <= min <= max <= {LONGEST}, not min={minimum}, max={maximum}")
    return ZipfLengths(theta, minimum, maximum, ratio, bool(values["independent"]))


def _fixed(options: str) -> LengthSource:
    values = parse_options("trace 'fixed'", options, {"prompt": 128, "output": 64})
    for key, value in values.items():
        if not 1 <= value <= LONGEST:
            raise ConfigError(f"trace 'fixed': {key} must be 1 to {LONGEST} tokens, not {value}")
    return FixedLengths(int(values["prompt"]), int(values["output"]))


def _bimodal(options: str) -> LengthSource:
    owner = "trace 'bimodal'"
    defaults = {"prompt": 64.0, "short": 32.0, "long": 512.0, "share": 0.5, "cv": 0.3}
    values = parse_options(owner, options, defaults)
    for key in ("prompt", "short", "long"):
        if not 1 <= values[key] <= LONGEST:
            raise ConfigError(f"{owner}: the mean {key} must be 1 to {LONGEST} tokens, not {values[key]:g}")
    if not 0 <= values["share"] <= 1:
        raise ConfigError(f"{owner}: share, the probability of a short answer, must be 0 to 1, not {values['share']:g}")
    if not _LEAST_CV <= values["cv"] <= _MOST_CV:
        raise ConfigError(f"{owner}: cv must be {_LEAST_CV:g} to {_MOST_CV:g}, not {values['cv']:g}")
    return BimodalLengths(values["prompt"], values["short"], values["long"], values["share"], values["cv"])


@dataclass(frozen=True)
class Builtin:
    """A built-in trace: how it is written, what it is, and what opens it with the text of its options."""

    usage: str
    description: str
    open: Callable[[str], LengthSource]


BUILTIN = {
    "sharegpt": Builtin("sharegpt", "ShareGPT first turns, from a shipped histogram", _histogram("sharegpt")),
    "sharegpt-opt": Builtin(
        "sharegpt-opt",
        "first turns with OPT's tokenizer, the sample of vLLM's paper, 161 in and 338 out",
        open_first_turns,
    ),
    "sharegpt-client": Builtin(
        f"sharegpt-client[:share={CLIENT_SHARE},filter=and|or]",
        "the same mixed with a share of entries that begin with an answer, as the paper's clients read them; "
        f"share={FITTED_SHARE} is fitted to the paper's points; filter=and is the artifact's, or vLLM's client's",
        open_client,
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
    KIND: Builtin(
        f"{KIND}:rtx4090|rtxpro6000",
        "requests that vLLM served on that GPU; --arrivals trace sends them when they were sent",
        open_measured,
    ),
}

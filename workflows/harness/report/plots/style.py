"""The style of all figures: fonts, a colour and a marker for every policy, the names of metrics."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from harness.analysis.derived import SETTLED

# Fonts for formulas, which no figure has, are looked for all the same.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

# Okabe and Ito's colours and three dark ones, which readers with a colour vision deficiency can tell apart.
_POLICIES = {
    "fastserve": ("#0072B2", "o"),
    "fastserve-fcfs": ("#E69F00", "s"),
    "vllm": ("#009E73", "^"),
    "vllm-chunked": ("#56B4E9", "v"),
    "mlfq": ("#CC79A7", "D"),
    "fastserve-artifact": ("#D55E00", "P"),
    "fixed-priority": ("#5C3D00", "X"),
    "srpt": ("#000000", "*"),
    "orca": ("#4B2A6B", "<"),
    "run-to-completion": ("#4D4D4D", "p"),
    "gittins": ("#8A2BE2", ">"),
}
POLICIES = tuple(_POLICIES)
"""Policies whose colour and marker are fixed."""
_OTHER_POLICIES = (("#A6761D", "h"), ("#666666", "d"), ("#1B9E77", ">"), ("#E7298A", "H"))
# Dashes and markers of further series of a policy, which share its colour.
_VARIANTS: tuple[tuple[tuple[float, ...], str], ...] = (
    ((4.0, 2.0), "d"),
    ((1.0, 1.5), ">"),
    ((6.0, 2.0, 1.0, 2.0), "X"),
    ((3.0, 1.0, 1.0, 1.0, 1.0, 1.0), "P"),
    ((8.0, 3.0), "s"),
    ((2.0, 1.0), "^"),
    ((5.0, 1.0, 1.0, 1.0), "h"),
)
PARTS = {"mean_queueing_s": "#BBBBBB", "mean_swapping_s": "#EE3377", "mean_execution_s": "#33BBEE"}
"""The parts of a completion time and their colours (Paul Tol's, apart from those of the policies)."""
SMALL = 11
"""Font size in points of the smallest text."""
SLO_LINE: Mapping[str, Any] = {"color": "#444444", "linestyle": (0, (6, 3)), "linewidth": 1.4}
RC: Any = {
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.labelsize": 12,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.title_fontsize": SMALL,
    "legend.frameon": False,
    "grid.color": "#E3E3E3",
    "axes.edgecolor": "#555555",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
    "font.family": "DejaVu Sans",
}
# If the ratio of the largest to the smallest value is higher, a linear axis does not show the small ones.
_LOG_FROM_RATIO = 20.0
_QUANTITIES = {
    "jct_s": ("completion time", "s"),
    "normalized_latency_s": ("normalized latency", "s/token"),
    "latency_per_total_token_s": ("latency over all tokens", "s/token of prompt and output"),
    "ttft_s": ("time to first token", "s"),
    "tpot_s": ("time per output token", "s/token"),
    "max_token_gap_s": ("longest gap between tokens", "s"),
    "slowdown": ("slowdown", "× alone on the machine"),
    "queueing_s": ("queueing time", "s"),
    "swapping_s": ("swapping time", "s"),
    "execution_s": ("execution time", "s"),
}
_OTHER_METRICS = {
    "output_tokens_per_s": ("Throughput (output tokens/s)", 1.0),
    "duration_s": ("Duration of the run (s)", 1.0),
    "swap_out_bytes": ("Swapped out (GB)", 1e-9),
    "swap_in_bytes": ("Swapped in (GB)", 1e-9),
    "recomputed_tokens": ("Recomputed tokens", 1.0),
}


# Markers at the edge are drawn whole; the layout depends on the axes only.
_WHOLE: dict[str, Any] = {"clip_on": False, "in_layout": False}


class SeriesStyle(NamedTuple):
    """The style of a series; `dashes` is empty for a solid line."""

    color: str
    marker: str
    dashes: tuple[float, ...]

    def line(self) -> dict[str, Any]:
        """Arguments of a line through our points."""
        linestyle = (0, self.dashes) if self.dashes else "-"
        return self.points() | {"linestyle": linestyle, "linewidth": 1.9}

    def points(self) -> dict[str, Any]:
        """Arguments of our points alone: filled markers."""
        style = {"color": self.color, "marker": self.marker, "linestyle": "none", "markersize": 7, **_WHOLE}
        return style | {"markeredgecolor": "white", "markeredgewidth": 0.6}

    def hollow(self) -> dict[str, Any]:
        """Arguments of the paper's points: hollow markers."""
        style = {"color": self.color, "marker": self.marker, "linestyle": "none", "markersize": 7.5, **_WHOLE}
        return style | {"markerfacecolor": "none", "markeredgecolor": self.color, "markeredgewidth": 1.5}

    def cross(self) -> dict[str, Any]:
        """Arguments of the points of the authors' rerun."""
        return {
            "color": self.color,
            "marker": "x",
            "linestyle": "none",
            "markersize": 6.5,
            "markeredgewidth": 1.5,
            **_WHOLE,
        }


def policy_style(policy: str, others: Sequence[str] = ()) -> tuple[str, str]:
    """Colour and marker of a policy: fixed for `POLICIES`; for a user's own policy, by its place in `others`."""
    if policy in _POLICIES:
        return _POLICIES[policy]
    unknown = [other for other in dict.fromkeys(others) if other not in _POLICIES]
    return _OTHER_POLICIES[unknown.index(policy) % len(_OTHER_POLICIES) if policy in unknown else 0]


def series_styles(series: Sequence[Mapping[str, Any]]) -> dict[str, SeriesStyle]:
    """The style of each series, by name.

    Of several series of a policy, the first that is no variant has the policy's marker and a solid line. The others
    share its colour; up to six of them have different dashes and markers. A variant is always dashed.
    """
    policies = [each["policy"] for each in series]
    styles = {}
    for policy in dict.fromkeys(policies):
        color, marker = policy_style(policy, policies)
        first, *others = sorted((each for each in series if each["policy"] == policy), key=_is_variant)
        others_from = 1 if _is_variant(first) else 0
        variants = [variant for variant in _VARIANTS if variant[1] != marker]
        styles[first["name"]] = SeriesStyle(color, marker, variants[0][0] if _is_variant(first) else ())
        for i, each in enumerate(others, others_from):
            dashes, variant_marker = variants[i % len(variants)]
            styles[each["name"]] = SeriesStyle(color, variant_marker, dashes)
    return styles


def _is_variant(series: Mapping[str, Any]) -> bool:
    return bool(series.get("variant"))


def metric_label(metric: str) -> str:
    """Write `p95_ttft_s` as "P95 time to first token (s)"; an unknown column as its words."""
    if metric in _OTHER_METRICS:
        return _OTHER_METRICS[metric][0]
    if metric.startswith("slo_attainment_"):
        return "Requests within the SLO (%)"
    statistic, _, quantity = metric.replace("_settled", "").partition("_")
    if quantity in _QUANTITIES and re.fullmatch(r"mean|max|p\d+", statistic):
        name, unit = _QUANTITIES[quantity]
        since = f" after {SETTLED} requests" if "_settled" in metric else ""
        return f"{statistic.upper() if statistic[0] == 'p' else statistic.capitalize()} {name}{since} ({unit})"
    return metric.replace("_", " ").capitalize()


def axis_label(metric: str) -> str:
    """The metric's label for a y axis, with the unit on a second line."""
    return metric_label(metric).replace(" (", "\n(")


def bound(metric: str, slo: float) -> str:
    """Write an SLO as a condition: "mean normalized latency ≤ 0.3 s/token"."""
    name, _, unit = metric_label(metric).partition(" (")
    sign = "≥" if rises_to_the_good(metric) else "≤"
    name = name if name[:1] == "P" else name[:1].lower() + name[1:]
    return f"{name} {sign} {slo * metric_scale(metric):g} {unit.removesuffix(')')}".rstrip()


def rises_to_the_good(metric: str) -> bool:
    """Whether more is better, so that an SLO is a lower bound."""
    return metric.startswith("slo_attainment") or metric == "output_tokens_per_s"


def metric_scale(metric: str) -> float:
    """The factor from a column to the unit that `metric_label` names."""
    if metric.startswith("slo_attainment_"):
        return 100.0
    return _OTHER_METRICS.get(metric, ("", 1.0))[1]


def scale_y(axes: Sequence[Axes], values: np.ndarray) -> None:
    """Scale axes to show all `values`: from 0 if that is enough, else logarithmic, and linear near 0 if a value is 0.

    Ticks are at 1, 2 and 5 times powers of ten if they fit, since decades alone are too few to read values.
    """
    values = values[np.isfinite(values)]
    positive = values[values > 0]
    spread = positive.max() / positive.min() if len(positive) else 1.0
    if spread < _LOG_FROM_RATIO or values.min() < 0:
        low, high = min(0.0, values.min(initial=0.0)), values.max(initial=0.0)
        for each in axes:
            each.set_ylim(1.06 * low, 1.06 * high or 1.0)
        return
    decades = np.log10(spread)
    steps = (1, 2, 5) if decades < 2.7 else (1, 3) if decades < 4 else (1,)
    for each in axes:
        if len(positive) < len(values):
            each.set_yscale("symlog", linthresh=positive.min(), linscale=0.3)
            each.set_ylim(-0.1 * positive.min(), positive.max() * 1.4)
        else:
            each.set_yscale("log")
            margin = max(1.3, spread**0.05)
            each.set_ylim(positive.min() / margin, positive.max() * margin)
            each.yaxis.set_major_locator(LogLocator(base=10, subs=steps, numticks=20))
        each.yaxis.set_minor_locator(NullLocator())
        each.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        each.yaxis.set_minor_formatter(NullFormatter())


def number(value: float) -> str:
    """Format a rate or a time for a figure: one decimal, or two digits below 1."""
    return f"{value:.1f}" if value >= 1 else f"{value:#.2g}"


def percent(share: float) -> str:
    """Format a share in percent, with a space that does not break."""
    return f"{100 * share:.0f}\u00a0%" if share >= 0.01 else "<1\u00a0%"

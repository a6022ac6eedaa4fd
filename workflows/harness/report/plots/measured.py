"""Measured runs of real engines: the simulation held against them, and what other policies would have done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from harness.report.plots.page import Page
from harness.report.plots.style import SMALL, metric_label, policy_style
from harness.studies.measured.errors import JUDGED, NAMES, metric_name, signed_percent
from harness.studies.measured.policies import METRICS
from harness.studies.measured.replay import ITERATIONS, MEASURED, SIMULATED

_REAL: Mapping[str, Any] = {"color": "#222222", "linewidth": 3.2, "alpha": 0.55}
_OURS: Mapping[str, Any] = {"color": "#0072B2", "linewidth": 1.7}
_ITERATIONS: Mapping[str, Any] = {"color": "#D55E00", "linewidth": 0.9}
_LINES = {MEASURED: _REAL, SIMULATED: _OURS, ITERATIONS: _ITERATIONS}
_MARKS = {"p50": "o", "p90": "s", "p99": "^"}
_UNITS = {"ttft_s": ("s", 1.0), "tpot_s": ("ms", 1000.0), "jct_s": ("s", 1.0), "normalized_latency_s": ("ms", 1000.0)}
"""Of each quantity, the unit on an axis, and the factor to it."""


def draw_truth(
    errors: pd.DataFrame, requests: pd.DataFrame, occupancy: pd.DataFrame, runs: pd.DataFrame, title: str
) -> Page:
    """Draw two rows for each measured run: the distributions of the quantities; batch, cache and all errors.

    The tables are those of `harness.studies.measured.replay.Replay`, `errors` with the errors of LLMServingSim.
    """
    names = list(dict.fromkeys(runs["run"]))
    page = Page(title, 2 * len(names), len(JUDGED), 3.3)
    for i, name in enumerate(names):
        above, below = page.axes[2 * i], page.axes[2 * i + 1]
        own, run = errors[errors["run"] == name], runs[runs["run"] == name].iloc[0]
        for axes, quantity in zip(above, JUDGED, strict=True):
            _draw_distribution(axes, requests[requests["run"] == name], own, quantity)
            page.name(axes, str(run["gpu"]), metric_label(f"mean_{quantity}").partition(" (")[0][5:], separator=": ")
        there = occupancy[occupancy["run"] == name]
        _draw_over_time(below[0], there, "batch", 1.0, "Requests in service")
        page.name(below[0], str(run["gpu"]), "batch over time", separator=": ")
        _draw_over_time(below[1], there, "cache_tokens", 1e-3, "Cache (thousand tokens)")
        capacity = float(there["capacity_tokens"].iloc[0]) * 1e-3
        if capacity < 2 * below[1].get_ylim()[1]:
            below[1].axhline(capacity, color="#444444", linestyle=(0, (6, 3)), linewidth=1.2, zorder=1)
        page.name(below[1], f"{run['gpu']}: cache; {run['simulated_preemptions']} preemptions simulated")
        _draw_errors(below[2], own)
        met = int((own["met"] == "yes").sum())
        page.name(below[2], f"{run['gpu']}: {met} of {len(own)} errors within the goal")
    page.legend(
        [
            Line2D([], [], label="vLLM, measured", **_REAL),
            Line2D([], [], label="simulated", **_OURS),
            *(Line2D([], [], label=mark.upper(), **_mark(marker, "#444444")) for mark, marker in _MARKS.items()),
            Line2D([], [], label="mean", **_mark("D", "#444444")),
            Line2D([], [], label="simulated, from iterations", **_ITERATIONS),
            Line2D([], [], label="size of the cache", color="#444444", linestyle=(0, (6, 3)), linewidth=1.2),
            Line2D([], [], label="LLMServingSim's error", **_hollow("D")),
        ]
    )
    return page


def _draw_distribution(axes: Axes, requests: pd.DataFrame, errors: pd.DataFrame, quantity: str) -> None:
    """Draw the share of requests up to each value, the four statistics, and their errors as text."""
    unit, scale = _UNITS[quantity]
    lines = []
    for kind in (MEASURED, SIMULATED):
        values = np.sort(requests.loc[requests["kind"] == kind, quantity].dropna().to_numpy(float)) * scale
        axes.step(values, np.arange(1, len(values) + 1) / len(values), where="post", **_LINES[kind])
    for row in errors[errors["metric"].str.endswith(quantity)].to_dict("records"):
        statistic = row["metric"].partition("_")[0]
        lines.append(f"{statistic if statistic == 'mean' else statistic.upper():>4} {signed_percent(row['error'])}")
        for kind, style in (("measured", _REAL), ("simulated", _OURS)):
            values = requests.loc[requests["kind"] == kind, quantity].dropna().to_numpy(float)
            share = float((values <= row[kind]).mean()) if statistic == "mean" else int(statistic[1:]) / 100
            axes.plot(row[kind] * scale, share, **_mark(_MARKS.get(statistic, "D"), style["color"]))
    axes.set_xlim(left=0)
    # In the corner that a rising curve leaves free.
    middle = scale * float(errors.loc[errors["metric"] == f"p50_{quantity}", "measured"].iloc[0])
    is_right = middle > 0.5 * axes.get_xlim()[1]
    where: dict[str, Any] = (
        {"x": 0.04, "y": 0.96, "ha": "left", "va": "top"} if is_right else {"x": 0.97, "y": 0.06, "ha": "right"}
    )
    axes.text(s="\n".join(lines), transform=axes.transAxes, fontsize=SMALL, family="DejaVu Sans Mono", **where)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel(f"{NAMES[quantity][:1].upper()}{NAMES[quantity][1:]} ({unit})")
    axes.set_ylabel("Share of requests")


def _draw_over_time(axes: Axes, occupancy: pd.DataFrame, column: str, scale: float, label: str) -> None:
    for kind, order in ((ITERATIONS, 2), (MEASURED, 3), (SIMULATED, 4)):
        own = occupancy[occupancy["kind"] == kind]
        axes.plot(own["time_s"].to_numpy(float), scale * own[column].to_numpy(float), zorder=order, **_LINES[kind])
    axes.set_xlim(0, float(occupancy["time_s"].max()))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Time (s)")
    axes.set_ylabel(label)


def _draw_errors(axes: Axes, errors: pd.DataFrame) -> None:
    """Draw each error beside its goal, and LLMServingSim's where it is published."""
    rows = np.arange(len(errors))
    for y, row in zip(rows, errors.to_dict("records"), strict=True):
        axes.fill_betweenx([y - 0.5, y + 0.5], -100 * row["goal"], 100 * row["goal"], color="#DDDDDD", linewidth=0)
        color = _OURS["color"] if row["met"] == "yes" else "#B00020"
        axes.plot(100 * row["error"], y, **_mark(_MARKS.get(row["metric"].partition("_")[0], "D"), color))
        if not pd.isna(row["llmservingsim_error"]):
            axes.plot(100 * row["llmservingsim_error"], y, **_hollow("D"))
    axes.axvline(0, color="#444444", linewidth=1.2, zorder=1)
    widest = max(6.0, 115 * float(errors[["error", "llmservingsim_error"]].abs().max().max()))
    axes.set_xlim(-widest, widest)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(rows, [metric_name(metric).replace("completion time", "completion") for metric in errors["metric"]])
    axes.tick_params(axis="y", labelsize=SMALL - 2)
    axes.set_xlabel("Error (%); grey: the goal")
    axes.grid(axis="y", visible=False)


def draw_policies(table: pd.DataFrame, title: str) -> Page:
    """Draw two rows of bars for each measured run, means and P99, a column for each quantity; all bars but the first of
    a panel are simulated.

    `table` is that of `harness.studies.measured.policies`. The grey band is as far from vLLM's simulated value as the
    simulator was from the measured one.
    """
    runs = list(dict.fromkeys(table["run"]))
    columns = len(METRICS) // 2
    page = Page(title, 2 * len(runs), columns, 0.9 + 0.29 * (1 + table["series"].nunique()), sharey="row")
    for i, name in enumerate(runs):
        own = table[table["run"] == name]
        for j, metric in enumerate(METRICS):
            axes = page.axes[2 * i + j % 2][j // 2]
            _draw_bars(axes, own[own["metric"] == metric], metric)
            page.name(axes, str(own["gpu"].iloc[0]), metric_name(metric), separator="\n")
    page.legend(
        [
            Patch(facecolor="white", edgecolor="#222222", hatch="////", label="vLLM, measured"),
            Patch(facecolor="#888888", label="simulated, in the colour of its policy"),
            Patch(facecolor="#DDDDDD", label="vLLM simulated ± the simulator's error in this metric"),
        ]
    )
    return page


def _draw_bars(axes: Axes, rows: pd.DataFrame, metric: str) -> None:
    unit, scale = _UNITS[metric.partition("_")[2]]
    truth, error = scale * float(rows["measured"].iloc[0]), abs(float(rows["error"].iloc[0]))
    repeated = scale * float(rows.loc[rows["beyond"] == "", "simulated"].iloc[0])
    labels = ["vLLM, MEASURED", *rows["label"]]
    values = np.array([truth, *(scale * rows["simulated"].to_numpy(float))])
    bars = axes.barh(
        np.arange(len(values)), values, 0.78, zorder=2, color=["white", *(_color(policy) for policy in rows["policy"])]
    )
    bars[0].set(edgecolor="#222222", hatch="////")
    axes.axvspan(repeated * (1 - error), repeated * (1 + error), color="#DDDDDD", linewidth=0, zorder=1)
    axes.set_xlim(0, 1.3 * values.max())
    axes.bar_label(bars, [_three_digits(value) for value in values], padding=3, fontsize=SMALL - 1)
    axes.set_yticks(np.arange(len(values)), labels)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlabel(f"{unit}{' a token' if metric.endswith('normalized_latency_s') else ''}")
    axes.grid(axis="y", visible=False)


def _color(policy: str) -> str:
    return policy_style(policy)[0]


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".") if value < 100 else f"{value:.0f}"


def _mark(marker: str, color: str) -> dict[str, Any]:
    return {
        "marker": marker, "color": color, "linestyle": "none", "markersize": 6.5, "markeredgecolor": "white",
        "markeredgewidth": 0.6, "zorder": 5,
    }  # fmt: skip


def _hollow(marker: str) -> dict[str, Any]:
    return {
        "marker": marker, "color": "#444444", "linestyle": "none", "markersize": 6.5, "markerfacecolor": "none",
        "markeredgewidth": 1.1,
    }  # fmt: skip

"""The simulator against the real engine: simulated over real times, and the relative error of each quantity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from fastserve.core.errors import ConfigError
from harness.analysis.pairs import BOUND, worst_runs_first
from harness.report.plots.page import Page
from harness.report.plots.style import SeriesStyle, metric_label, series_styles
from harness.report.plots.tables import Tables

_TIMES: Mapping[str, str] = {"mean_jct_s": "full", "p95_jct_s": "right"}
"""Quantities of the left panel, and how its markers are filled."""
_ERROR_STYLES = (
    ("#222222", "o"),
    ("#222222", "D"),
    ("#777777", "^"),
    ("#777777", "s"),
    ("#AAAAAA", "v"),
    ("#AAAAAA", "P"),
)


def draw_fidelity(tables: Tables) -> Page:
    """Draw simulated over real completion times at the left, the errors (simulated - real) / real at the right.

    A run is a line at the right, that with the largest error first. `points` is the table of comparisons: policy,
    label, load (or rate), and real_, sim_ and error_ of each quantity. Raises ConfigError if one of these is missing
    for completion times.
    """
    table = tables.points
    for name in (f"{kind}_{quantity}" for quantity in _TIMES for kind in ("real", "sim", "error")):
        if name not in table:
            raise ConfigError(f"figure 'fidelity' needs a column {name!r}; there are: {', '.join(table.columns)}")
    quantities = [str(name).removeprefix("error_") for name in table if str(name).startswith("error_")]
    height = max(4.6, 1.9 + 0.27 * len(table))
    page = Page(tables.experiment["title"], 1, 2, height, width_ratios=(1, 1.05))
    times, errors = page.flat
    series = dict.fromkeys(zip(table["label"], table["policy"], strict=True))
    styles = series_styles([{"name": label, "policy": policy} for label, policy in series])
    _draw_times(times, table, styles)
    _draw_errors(errors, worst_runs_first(table), quantities)
    page.legend(
        [
            Line2D([], [], color=style.color, marker=style.marker, linestyle="none", markersize=7, label=label)
            for label, style in styles.items()
        ]
    )
    return page


def _draw_times(axes: Axes, table: pd.DataFrame, styles: Mapping[str, SeriesStyle]) -> None:
    for row in table.to_dict("records"):
        color, marker, _ = styles[row["label"]]
        for quantity, fill in _TIMES.items():
            axes.plot(
                row[f"real_{quantity}"], row[f"sim_{quantity}"], zorder=3, color=color, marker=marker, **_filled(fill)
            )
    drawn = np.array([[line.get_xdata(), line.get_ydata()] for line in axes.lines], dtype=float)
    span = np.array([np.nanmin(drawn) / 1.25, np.nanmax(drawn) * 1.25])
    axes.plot(span, span, color="#444444", linewidth=1.2, zorder=1, label="equal")
    axes.fill_between(span, (1 - BOUND) * span, (1 + BOUND) * span, color="#444444", alpha=0.12, linewidth=0)
    axes.set(xscale="log", yscale="log", xlim=span, ylim=span, aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel("Real completion time (s)")
    axes.set_ylabel("Simulated completion time (s)")
    handles = [
        Line2D([], [], color="#444444", marker="o", label=metric_label(quantity).partition(" ")[0], **_filled(fill))
        for quantity, fill in _TIMES.items()
    ]
    axes.legend(
        handles=[*handles, Line2D([], [], color="#444444", label=f"equal, ±{100 * BOUND:g} %")], loc="upper left"
    )


def _run_names(table: pd.DataFrame) -> list[str]:
    if "load" in table:
        return [f"{label}, load {load:g}" for label, load in zip(table["label"], table["load"], strict=True)]
    return [f"{label}, {rate:g}/s" for label, rate in zip(table["label"], table["rate"], strict=True)]


def _filled(fill: str) -> dict[str, Any]:
    return {"fillstyle": fill, "markerfacecoloralt": "white", "markersize": 8, "linestyle": "none"}


def _draw_errors(axes: Axes, table: pd.DataFrame, quantities: list[str]) -> None:
    rows = np.arange(len(table))
    handles = []
    for i, quantity in enumerate(quantities):
        color, marker = _ERROR_STYLES[i % len(_ERROR_STYLES)]
        (line,) = axes.plot(
            table[f"error_{quantity}"].to_numpy(float),
            rows,
            color=color,
            marker=marker,
            linestyle="none",
            markersize=7,
            zorder=3,
        )
        line.set_label(metric_label(quantity).partition(" (")[0])
        handles.append(line)
    axes.axvspan(-BOUND, BOUND, color="#444444", alpha=0.12, linewidth=0)
    axes.axvline(0, color="#444444", linewidth=1.2, zorder=1)
    axes.set_yticks(rows, _run_names(table))
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.set_xlabel("Error of the simulation (share of the real value)")
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.4, -0.16), ncols=2)

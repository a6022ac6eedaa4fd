"""Recorded runs of the real engine: their latency over the rate, and the simulator's errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from harness.report.plots.elements import XAxis, drawn_values, hide_unused
from harness.report.plots.page import Page
from harness.report.plots.style import SeriesStyle, axis_label, metric_label, scale_y, series_styles
from harness.studies.agreement import BOUND

SHOWN = "mean_normalized_latency_s"
"""The metric drawn over the rate."""
_COMPARED = tuple(
    f"{statistic}_{quantity}"
    for statistic in ("mean", "p95")
    for quantity in ("normalized_latency_s", "jct_s", "ttft_s")
)
_SETTING = ["max_batch_size", "trace", "memory"]
_LINEAR = 2 * BOUND
"""Errors up to here are on a linear axis, larger ones on a logarithmic one."""
_RING: Mapping[str, Any] = {"markersize": 11.5, "markeredgewidth": 1.4, "zorder": 2}
"""The simulation's marker: a ring, which encloses the measured point if both agree."""


def draw_latency(table: pd.DataFrame, title: str) -> Page:
    """Draw a panel for each setting: measured values as lines, simulated values as rings."""
    settings = list(table.groupby(_SETTING, sort=False))
    columns = min(len(settings), 4)
    page = Page(title, -(-len(settings) // columns), columns, 3.3 if len(settings) > 2 else 4.4)
    styles = _styles(table)
    for i, (axes, (_, rows)) in enumerate(zip(page.flat, settings, strict=False)):
        at = XAxis(rows["rate"])
        for name, own in rows.sort_values("rate").groupby("series", sort=False):
            x = [at.of(float(rate)) for rate in own["rate"]]
            axes.plot(x, own[f"real_{SHOWN}"].to_numpy(float), **styles[str(name)].line() | {"zorder": 3})
            axes.plot(x, own[f"sim_{SHOWN}"].to_numpy(float), **{**styles[str(name)].hollow(), **_RING})
        at.apply(axes, "Request rate (requests/s)")
        axes.set_ylabel(axis_label(SHOWN) if i % columns == 0 else "")
        scale_y([axes], drawn_values([axes]))
        page.name(axes, *_name(rows), separator="\n")
    hide_unused(page.flat, len(settings))
    ring = {**SeriesStyle("#444444", "o", ()).hollow(), **_RING}
    page.legend([*_handles(table, styles, lines=True), Line2D([], [], label="ring: simulated", **ring)])
    return page


def draw_agreement(table: pd.DataFrame, title: str) -> Page:
    """Draw a panel for each quantity: the simulation's relative error over the measured value, a point for each run."""
    page = Page(title, 2, 3, 3.3, sharey=True)
    styles = _styles(table)
    largest = max(float(table[f"error_{metric}"].abs().max()) for metric in _COMPARED)
    for i, (axes, metric) in enumerate(zip(page.flat, _COMPARED, strict=True)):
        for name, own in table.groupby("series", sort=False):
            errors = own[f"error_{metric}"].to_numpy(float)
            axes.plot(own[f"real_{metric}"].to_numpy(float), errors, zorder=3, **styles[str(name)].points())
        _scale_errors(axes, largest)
        name, _, unit = metric_label(metric).partition(" (")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        axes.set_xlabel(f"Measured ({unit}")
        axes.set_ylabel("Error of the simulation" if i % 3 == 0 else "")
        within = int((table[f"error_{metric}"].abs() <= BOUND).sum())
        page.name(axes, name, f"{within} of {len(table)} within {100 * BOUND:g} %", separator="\n")
    page.legend(_handles(table, styles, lines=False))
    return page


def _scale_errors(axes: Axes, largest: float) -> None:
    axes.axhspan(-BOUND, BOUND, color="#444444", alpha=0.12, linewidth=0)
    axes.axhline(0, color="#444444", linewidth=1.2, zorder=1)
    if largest <= _LINEAR:
        ticks = np.array([-_LINEAR, -BOUND, 0, BOUND, _LINEAR])
        axes.set_ylim(-1.05 * _LINEAR, 1.05 * _LINEAR)
    else:
        axes.set_yscale("symlog", linthresh=_LINEAR, linscale=1.5)
        beyond = [step for step in (0.2, 0.5, 1, 2, 5, 10, 100, 1000) if step < 1.2 * largest]
        ticks = np.array([*(-step for step in beyond if step <= 1), -_LINEAR, -BOUND, 0, BOUND, _LINEAR, *beyond])
        axes.set_ylim(-min(1.2 * largest, 1.2), 1.2 * largest)
    axes.set_yticks(ticks, [f"{100 * tick:+g} %" if tick else "0" for tick in ticks])
    axes.minorticks_off()


def _styles(table: pd.DataFrame) -> dict[str, SeriesStyle]:
    series = table[["policy", "series"]].drop_duplicates().rename(columns={"series": "name"})
    return series_styles([{str(key): value for key, value in each.items()} for each in series.to_dict("records")])


def _handles(table: pd.DataFrame, styles: Mapping[str, SeriesStyle], *, lines: bool) -> list[Artist]:
    handles: list[Artist] = []
    for name, label in table[["series", "label"]].drop_duplicates().itertuples(index=False):
        handles.append(Line2D([], [], label=label, **(styles[name].line() if lines else styles[name].points())))
    return handles


def _name(rows: pd.DataFrame) -> Iterator[str]:
    first = rows.iloc[0]
    yield str(first["trace"])
    memory = "all memory" if first["memory"] == "all" else f"memory {first['memory']}"
    yield f"batch {first['max_batch_size']}, {memory}"


def flags_of_recorded(table: pd.DataFrame) -> Sequence[str]:
    """List the warnings: runs with failed requests."""
    lost = table[table["real_failed"] > 0]
    if lost.empty:
        return []
    named = dict.fromkeys(f"{row.label} ({row.trace}, batch {row.max_batch_size})" for row in lost.itertuples())
    return [f"Requests failed; latencies cover the finished requests: {', '.join(named)}"]

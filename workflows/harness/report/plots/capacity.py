"""The highest rate within the SLO, over what the panels vary: memory, batch size, model, burst length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import Transform, blended_transform_factory

from fastserve.core.errors import ConfigError
from harness.report.plots.elements import (
    XAxis,
    capacity_or_bound,
    dodges,
    drawn_values,
    paper_handle,
    series_handles,
    shifted,
)
from harness.report.plots.page import Page
from harness.report.plots.style import SeriesStyle, bound, scale_y, series_styles
from harness.report.plots.tables import Tables, X, as_x

_ARROW = 22
"""Length in printer's points."""
_CROSS: dict[str, Any] = {"marker": "x", "markeredgewidth": 2.0, "markersize": 8}
_DASH: dict[str, Any] = {"marker": "_", "markeredgewidth": 2.5, "markersize": 11}
_GREY: dict[str, Any] = {"color": "#444444", "linestyle": "none", "markersize": 9}
_EXPLAINED = {
    "paper": paper_handle(),
    "above": Line2D([], [], label="higher than any rate measured", marker="$\\uparrow$", **_GREY),
    "below": Line2D([], [], label="lower than any rate measured", marker="$\\downarrow$", **_GREY),
    "unknown": Line2D([], [], label="not known: some seed has no value", **_GREY | _CROSS),
}


def draw_capacity(tables: Tables) -> Page:
    """Draw the capacity of each series with its 95 % interval: a line over numbers, points over categories.

    If a capacity or an end of an interval lies beyond the measured rates, an arrow starts at the last of them. An
    unknown capacity is a cross at the bottom. Raises ConfigError without a table of capacities.
    """
    if tables.capacity is None or tables.capacity.empty:
        raise ConfigError("figure 'capacity' draws capacities: give the experiment an slo")
    page = Page(tables.experiment["title"], 1, 1, 4.6)
    axes = page.flat[0]
    metric = tables.metrics[0]
    styles = series_styles(tables.series)
    places = {panel["name"]: _place(panel) for panel in tables.panels}
    at = XAxis(places.values(), tables.x_log())
    by_place = sorted(places, key=lambda name: at.of(places[name]))
    kinds: set[str] = set()
    unknown: list[tuple[float, Transform, SeriesStyle]] = []
    for series, dodge in zip(tables.series, dodges(len(tables.series), 6.0 if at.numeric else 9.0), strict=True):
        style, where = styles[series["name"]], shifted(axes, dodge)
        finite: list[tuple[X, float]] = []
        for panel in by_place:
            row = tables.capacity_of(panel, series["name"], metric)
            measured = tables.measured(panel, series["name"])
            if row is None or measured is None:
                continue
            x = at.of(places[panel])
            capacity = capacity_or_bound(tables, panel, series["name"], metric, row)
            found = _draw_interval(axes, x, capacity, row, measured, where, style)
            if "unknown" in found:
                unknown.append((x, where, style))
            kinds |= found
            finite.append((places[panel], capacity if math.isfinite(capacity) else math.nan))
        for numeric, how in ((True, style.line()), (False, style.points())):
            drawn = [(at.of(x), y) for x, y in finite if isinstance(x, float) == numeric]
            axes.plot([x for x, _ in drawn], [y for _, y in drawn], transform=where, zorder=3, **how)
    at.apply(axes, (tables.experiment.get("x") or {}).get("label") or "")
    axes.set_ylabel(f"Highest rate (requests/s) with\n{bound(metric, tables.experiment['slo'])}")
    scale_y([axes], drawn_values([axes]))
    _make_room_for_arrows(axes, kinds)
    for x, where, style in unknown:
        bottom = blended_transform_factory(where, axes.transAxes)
        axes.plot(x, 0.03, transform=bottom, **style.points() | _CROSS | {"markeredgecolor": style.color})
    page.legend([*series_handles(tables, styles), *(_EXPLAINED[kind] for kind in _EXPLAINED if kind in kinds)])
    return page


def _place(panel: Mapping[str, Any]) -> X:
    if panel.get("x") is None:
        raise ConfigError(f"figure 'capacity' needs an x for every panel: {panel['name']!r} has none")
    return as_x(panel["x"])


def _draw_interval(
    axes: Axes,
    x: float,
    capacity: float,
    row: Mapping[str, Any],
    measured: tuple[float, float],
    where: Transform,
    style: SeriesStyle,
) -> set[str]:
    """Draw whiskers, arrows and the paper's point of one capacity; return the explanations that they need."""
    kinds = set()
    if (paper := row.get("paper_capacity")) is not None and not math.isnan(paper):
        kinds.add("paper")
        axes.plot(x, paper, transform=where, zorder=4, **style.hollow())
    if math.isnan(capacity):
        return kinds | {"unknown"}
    ends = np.array([math.nan if row[end] is None else row[end] for end in ("low", "high")], dtype=float)
    if math.isinf(capacity):
        dash = _DASH | {"markeredgecolor": style.color}
        axes.plot(x, measured[int(capacity > 0)], transform=where, **style.points() | dash)
    else:
        axes.vlines(x, *np.clip(ends, *measured), color=style.color, linewidth=1.8, transform=where)
    for end in {capacity, *ends}:
        if math.isinf(end):
            kinds.add(_arrow(axes, x, measured, end, where, style))
    return kinds


def _arrow(
    axes: Axes, x: float, measured: tuple[float, float], end: float, where: Transform, style: SeriesStyle
) -> str:
    """Draw an arrow from the last measured rate towards an open end; return the name of its explanation."""
    arrow = axes.annotate(
        "",
        xy=(x, measured[int(end > 0)]),
        xycoords=where,
        xytext=(0, math.copysign(_ARROW, end)),
        textcoords="offset points",
        arrowprops={"arrowstyle": "<|-", "color": style.color, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0},
    )
    arrow.set_in_layout(False)
    return "above" if end > 0 else "below"


def _make_room_for_arrows(axes: Axes, kinds: set[str]) -> None:
    """Widen the limits where arrows leave the range of the values."""
    low, high = axes.get_ylim()
    linear = axes.get_yscale() == "linear"
    if "above" in kinds:
        axes.set_ylim(top=1.1 * high if linear else 1.5 * high)
    if "below" in kinds:
        axes.set_ylim(bottom=-0.08 * high if linear else low / 1.5)

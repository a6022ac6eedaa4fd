"""The parts of the completion time over the rate: queueing, swapping, execution (the paper's figure 17b)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from fastserve.core.errors import ConfigError
from harness.report.plots.elements import XAxis, drawn_values, paper_handle
from harness.report.plots.page import Page
from harness.report.plots.style import PARTS, SeriesStyle, metric_label, scale_y
from harness.report.plots.tables import Tables

_SWAPPING = "mean_swapping_s"


def draw_breakdown(tables: Tables) -> Page:
    """Draw a column for each panel and series: stacked bars, each part on a logarithmic axis, the share of swapping.

    The paper's points are a table with a column `quantity`: queueing_s (or queuing_s), swapping_s or execution_s.
    Raises ConfigError for another quantity.
    """
    columns = [
        (panel, series)
        for panel in tables.panels
        for series in tables.series
        if len(tables.rows(panel["name"], series["name"]))
    ]
    heights = (2.6, 2.6, 1.9)
    page = Page(
        tables.experiment["title"],
        len(heights),
        len(columns),
        sum(heights) / len(heights),
        sharex="col",
        sharey="row",
        height_ratios=heights,
    )
    for column, (panel, series) in zip(page.axes.T, columns, strict=True):
        _draw_column(column, tables, panel["name"], series)
        page.name(column[0], panel.get("title"), series["label"])
    stacked, parts, share = page.axes
    stacked[0].set_ylabel("Completion time (s),\nstacked")
    parts[0].set_ylabel("Each part (s)")
    share[0].set_ylabel("Swapping\n(% of the time)")
    scale_y(list(parts), drawn_values(parts))
    scale_y(list(share), drawn_values(share))
    handles: list[Artist] = [
        Patch(facecolor=color, label=metric_label(part).removeprefix("Mean ").removesuffix(" (s)").capitalize())
        for part, color in PARTS.items()
    ]
    if len(tables.reported):
        handles.append(paper_handle())
    page.legend(handles)
    return page


def _draw_column(column: np.ndarray, tables: Tables, panel: str, series: Mapping[str, Any]) -> None:
    stacked, parts, share = column
    paper = _paper_parts(tables, panel, series)
    curves = {part: tables.curve(panel, series["name"], part) for part in PARTS}
    at = XAxis([*curves[_SWAPPING].x, *paper.index], even=True)
    places = np.array([at.of(x) for x in curves[_SWAPPING].x])
    bottom = np.zeros(len(places))
    for part, curve in curves.items():
        stacked.bar(places, curve.mean, 0.8, bottom, color=PARTS[part], linewidth=0, label=part)
        bottom = bottom + curve.mean
        _points(parts, places, curve.mean, curve.low, curve.high, PARTS[part])
    total = sum(curve.mean for curve in curves.values())
    _points(share, places, 100 * curves[_SWAPPING].mean / total, None, None, PARTS[_SWAPPING])
    if len(paper):
        theirs = np.array([at.of(x) for x in paper.index])
        for part, color in PARTS.items():
            parts.plot(theirs, paper[part], zorder=4, **SeriesStyle(color, "o", ()).hollow())
        whole = paper[list(PARTS)].sum(axis=1, min_count=len(PARTS))
        stacked.plot(theirs, whole, zorder=4, **SeriesStyle("#444444", "o", ()).hollow())
        share.plot(theirs, 100 * paper[_SWAPPING] / whole, zorder=4, **SeriesStyle(PARTS[_SWAPPING], "o", ()).hollow())
    for axes in column:
        at.apply(axes, tables.x_label() if axes is share else "")
        axes.grid(axis="x", visible=False)


def _points(
    axes: Axes, x: np.ndarray, mean: np.ndarray, low: np.ndarray | None, high: np.ndarray | None, color: str
) -> None:
    style = SeriesStyle(color, "o", ())
    if low is not None and high is not None:
        axes.vlines(x, low, high, color=color, linewidth=1.8)
    axes.plot(x, mean, zorder=3, **style.points() | {"markeredgecolor": color})


def _paper_parts(tables: Tables, panel: str, series: Mapping[str, Any]) -> pd.DataFrame:
    """The paper's times by rate, with a column for each part; no rows if the paper has none for the series."""
    reported = tables.paper(panel, series)
    if reported.empty:
        return pd.DataFrame(columns=list(PARTS))
    if "quantity" not in reported:
        raise ConfigError("figure 'breakdown' needs the paper's points with a column 'quantity'")
    quantity = reported["quantity"].map(
        lambda name: f"mean_{str(name).removeprefix('mean_').replace('queuing', 'queueing')}"
    )
    for name, given in zip(quantity, reported["quantity"], strict=True):
        if name not in PARTS:
            valid = ", ".join(part.removeprefix("mean_") for part in PARTS)
            raise ConfigError(f"the paper's points have quantity {given!r}; figure 'breakdown' draws {valid}")
    wide = reported.assign(quantity=quantity, rate=reported["rate"].astype(float))
    return wide.pivot(index="rate", columns="quantity", values="value").reindex(columns=list(PARTS)).astype(float)

"""Many settings on one page: each series over a reference series, by panel and x (rows) and metric (columns)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from fastserve.core.errors import ConfigError
from harness.experiments.experiment import x_key
from harness.report.plots.elements import shifted
from harness.report.plots.page import Page
from harness.report.plots.style import SMALL, SeriesStyle, metric_label, rises_to_the_good, series_styles
from harness.report.plots.tables import Tables, X

LIMITS = (1 / 20, 20.0)
"""Ratios beyond these limits are drawn at the limit, with an arrow."""
_SHOWN = (0.5, 2.0)  # The least range of the axis, so that small differences do not look large.
_LINE, _CHARACTER = 1.2 * SMALL / 72, 0.6 * SMALL / 72
_MARKER: dict[str, Any] = {"markersize": 6.5, "markeredgewidth": 0.4}
_LEFT, _RIGHT = r"$\leftarrow$", r"$\rightarrow$"
Row = tuple[str, X]
"""A row: a panel, and an x at which the reference has a point."""


def draw_ratios(tables: Tables) -> Page:
    """Draw ratios of means over seeds on a logarithmic axis, with 95 % intervals; the reference is the line at 1.

    Raises ConfigError if the experiment does not name the reference series, or if that has no points.
    """
    series = {each["name"]: each for each in tables.series}
    reference = series.pop(tables.experiment.get("over"), None)
    if reference is None:
        raise ConfigError(f"ratios need a series over which to show others: set over to one of {', '.join(series)}")
    over, metrics = reference["name"], tables.metrics
    has = {panel["name"]: tables.curve(panel["name"], over, metrics[0]).x for panel in tables.panels}
    rows = [(panel, x) for panel in has for x in tables.xs(panel) if x in has[panel]]
    if not rows:
        raise ConfigError(f"the points have none of the series {over!r}: there is nothing to show the others over")
    labels = _labels(tables, rows)
    lines = [label.split("\n") for label in labels]
    step = max(0.085 * len(series) + 0.04, _LINE * max(map(len, lines)) + 0.04)
    page = Page(tables.experiment["title"], 1, len(metrics), step * len(rows) + 1.2, sharey=True)
    beside = _CHARACTER * max(len(line) for label in lines for line in label) + 0.4
    styles = series_styles(tables.series)
    beyond = False
    for axes, metric in zip(page.flat, metrics, strict=True):
        seen = []
        for i, name in enumerate(series):
            curves = {panel["name"]: tables.ratio(panel["name"], name, over, metric) for panel in tables.panels}
            y = [rows.index((panel, x)) for panel, curve in curves.items() for x in curve.x]
            values = np.hstack([(curve.mean, curve.low, curve.high) for curve in curves.values()])
            dodge = 0.84 * ((i + 0.5) / len(series) - 0.5)
            _draw(axes, np.array(y) + dodge, values, styles[name])
            seen.append(values)
            beyond |= bool(np.any((values[0] < LIMITS[0]) | (values[0] > LIMITS[1])))
        axes.axvline(1, color=styles[over].color, linewidth=1.6, zorder=1)
        _scale_x(axes, np.hstack(seen), len(metrics))
        better = "above" if rises_to_the_good(metric) else "below"
        axes.set_xlabel(f"Over {reference['label']}\n({better} 1: better)")
        page.name(axes, metric_label(metric).partition(" (")[0], beside=beside)
        _rule(axes, rows)
    page.flat[0].set_yticks(range(len(rows)), labels)
    page.flat[0].set_ylabel(f"Setting · {tables.x_label()}")
    handles = [Line2D([], [], label=each["label"], **styles[name].points()) for name, each in series.items()]
    line = Line2D([], [], color=styles[over].color, linewidth=1.6, label=f"{reference['label']}: the line at 1")
    arrow = Line2D([], [], color="#444444", linestyle="none", marker=_RIGHT, markersize=7, label="beyond 1/20 or 20")
    page.legend([*handles, line, *([arrow] if beyond else [])])
    return page


def _labels(tables: Tables, rows: Sequence[Row]) -> list[str]:
    titles = {panel["name"]: str(panel.get("title") or panel["name"]) for panel in tables.panels}
    texts = (" · ".join(part for part in (titles[panel], x_key(x)) if part) for panel, x in rows)
    return ["\n".join(textwrap.wrap(text, 34)) for text in texts]


def _draw(axes: Axes, y: np.ndarray, values: np.ndarray, style: SeriesStyle) -> None:
    """Draw points with whiskers: `values` are ratios and the ends of their intervals, [3, points]."""
    ratio, low, high = np.clip(values, *LIMITS)
    axes.hlines(y, low, high, color=style.color, linewidth=1.6, zorder=2)
    axes.plot(ratio, y, zorder=3, **style.points() | _MARKER)
    for beyond, arrow, away in ((values[0] < LIMITS[0], _LEFT, -8), (values[0] > LIMITS[1], _RIGHT, 8)):
        marker = style.points() | {"marker": arrow, "markersize": 7, "markeredgecolor": style.color}
        axes.plot(ratio[beyond], y[beyond], transform=shifted(axes, away), zorder=3, **marker)


def _scale_x(axes: Axes, values: np.ndarray, columns: int) -> None:
    """Set a logarithmic axis that shows all points, with as many ticks as fit."""
    drawn = np.clip(values[np.isfinite(values)], *LIMITS)
    low, high = min(drawn.min(initial=1), _SHOWN[0]), max(drawn.max(initial=1), _SHOWN[1])
    margin = (high / low) ** 0.06
    axes.set_xscale("log")
    axes.set_xlim(low / margin, high * margin)
    steps = (1, 2, 5) if columns * np.log10(high / low) < 7 else (1, 3)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=steps, numticks=20))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _rule(axes: Axes, rows: Sequence[Row]) -> None:
    """Order the rows from top to bottom, shade every second row, and draw a line between panels."""
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    for i, (panel, _) in enumerate(rows):
        if i % 2:
            axes.axhspan(i - 0.5, i + 0.5, color="#F4F4F4", linewidth=0, zorder=0)
        if i and panel != rows[i - 1][0]:
            axes.axhline(i - 0.5, color="#888888", linewidth=0.8, zorder=1)

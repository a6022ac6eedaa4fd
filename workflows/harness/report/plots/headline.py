"""The claims of the paper on one page: what it claims, its authors' rerun, ours with intervals, and the verdict."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from fastserve.core.errors import ConfigError
from harness.analysis.verdicts import (
    ATTENUATED,
    CONSISTENT,
    CONTRADICTED,
    DIRECTION_ONLY,
    INFLATED,
    UNTESTABLE,
)
from harness.report.plots.page import Page
from harness.report.plots.style import SMALL

VERDICTS: Mapping[str, tuple[str, str]] = {
    CONSISTENT: ("#009E73", "o"),
    ATTENUATED: ("#E69F00", "s"),
    INFLATED: ("#56B4E9", "^"),
    DIRECTION_ONLY: ("#CC79A7", "D"),
    CONTRADICTED: ("#D55E00", "X"),
    UNTESTABLE: ("#7F7F7F", "x"),
}
"""Colour and marker of each verdict on a claim: Okabe and Ito's."""
LOADS = "capacity"
"""The kind of measure whose claims have a page of their own."""
_NEEDED = (
    "label", "kind", "group", "source", "paper_low", "paper_high", "rerun", "value", "low", "high", "sample_low",
    "sample_high", "verdict",
)  # fmt: skip
_ROW, _HEADING = 0.235, 0.36
"""Heights in inches."""
_COLUMNS = (("paper", 0.0), ("rerun", 0.2), ("ours [95 %]", 0.335), ("verdict", 0.765))
"""Columns of the table at the right, and where they begin, in its widths."""
_GREY = "#444444"
_CLAIM: dict[str, Any] = {"color": "black", "markerfacecolor": "white", "markeredgewidth": 1.5}
_RERUN: dict[str, Any] = {"color": "black", "marker": "x", "markersize": 6.5, "markeredgewidth": 1.5}
_ELSEWHERE = "Abstracts and earlier versions"


def draw_claims(claims: pd.DataFrame, loads: bool = False) -> Page:
    """Draw a row for each claim of the paper, figure by figure: comparisons and shares, or the `loads` themselves.

    Raises ConfigError if the table lacks a column, or if there is no such claim.
    """
    for column in _NEEDED:
        if column not in claims:
            raise ConfigError(f"the table of claims has no column {column!r}; there are: {', '.join(claims.columns)}")
    shown = claims[(claims["group"] == "paper") & ((claims["kind"] == LOADS) == loads) & claims["paper_low"].notna()]
    if shown.empty:
        raise ConfigError("the table of claims has no such claim with a number of the paper's: nothing to draw")
    places, headings, height = _places([str(source) for source in shown["source"]])
    title = "The paper's claims: loads (requests/s)" if loads else "The paper's claims, and what we measure"
    page = Page(title, 1, 2, height + 0.75, width_ratios=(1.0, 0.9), sharey=True)
    axes, table = page.flat
    rows = shown.to_dict("records")
    limits = _limits(rows)
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    axes.set_ylim(height, 0)
    table.set_xlim(0, 1)
    for row, y in zip(rows, places, strict=True):
        _draw_row(axes, row, y, limits)
        _write_row(table, row, y)
    for name, y in headings.items():
        axes.text(-0.01, y, name, transform=axes.get_yaxis_transform(), ha="right", va="center", fontweight="bold")
    for name, x in _COLUMNS:
        table.text(x, 0.12, name, va="center", fontweight="bold", fontsize=SMALL)
    table.set_axis_off()
    if not loads:
        axes.axvline(1, color=_GREY, linewidth=1.0, zorder=1)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(places, [str(row["label"]) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("Requests per second" if loads else "Times the other system's (1: no difference), or per cent")
    _legend(page, [str(row["verdict"]) for row in rows])
    return page


def _places(sources: Sequence[str]) -> tuple[list[float], dict[str, float], float]:
    """Where each row stands, in inches from the top, and the heading before each figure's; and the height of all."""
    places: list[float] = []
    headings: dict[str, float] = {}
    y = 0.12
    for source in sources:
        number = re.search(r"Fig\. (\d+)", source)
        heading = f"Figure {number[1]}" if number else _ELSEWHERE
        if heading not in headings:
            headings[heading] = y + _HEADING / 2
            y += _HEADING
        places.append(y + _ROW / 2)
        y += _ROW
    return places, headings, y + 0.1


def _limits(rows: Sequence[Mapping[Hashable, Any]]) -> tuple[float, float]:
    """Limits of the axis that show every claim and every value, and room for their intervals."""
    columns = ("paper_low", "paper_high", "rerun", "value")
    numbers = np.array([row[column] for row in rows for column in columns], dtype=float)
    numbers = numbers[np.isfinite(numbers) & (numbers > 0)]
    return float(numbers.min()) / 1.7, float(numbers.max()) * 1.7


def _draw_row(axes: Axes, row: Mapping[Hashable, Any], y: float, limits: tuple[float, float]) -> None:
    color, marker = VERDICTS.get(row["verdict"], (_GREY, "o"))
    _draw_interval(axes, row["sample_low"], row["sample_high"], y, limits, color=color, linewidth=1.3, alpha=0.75)
    _draw_interval(axes, row["low"], row["high"], y, limits, color=color, linewidth=4.5, alpha=0.75)
    low, high = float(row["paper_low"]), float(row["paper_high"])
    if low < high:
        axes.plot([low, high], [y, y], marker="|", markersize=9, linewidth=1.2, zorder=5, **_CLAIM)
    else:
        axes.plot(low, y, marker="o", markersize=6.5, linestyle="none", zorder=5, **_CLAIM)
    if not pd.isna(row["rerun"]):
        axes.plot(row["rerun"], y, linestyle="none", zorder=6, **_RERUN)
    if not pd.isna(row["value"]):
        axes.plot(row["value"], y, marker=marker, color=color, markersize=7.5, linestyle="none", zorder=4)


def _write_row(table: Axes, row: Mapping[Hashable, Any], y: float) -> None:
    """Write a row's numbers and its verdict, with the verdict's marker."""
    claimed = _claimed(float(row["paper_low"]), float(row["paper_high"]))
    texts = [claimed, _number(row["rerun"]), _ours(row), str(row["verdict"])]
    for (_, x), text in zip(_COLUMNS, texts, strict=True):
        table.text(x, y, text, va="center", fontsize=SMALL)
    color, marker = VERDICTS.get(row["verdict"], (_GREY, "o"))
    table.plot(_COLUMNS[-1][1] - 0.03, y, clip_on=False, marker=marker, color=color, markersize=7.5)


def _draw_interval(axes: Axes, low: Any, high: Any, y: float, limits: tuple[float, float], **look: Any) -> None:
    """Draw a bar; an end that is open, or beyond the axis, is an arrow at the edge."""
    if pd.isna(low) or pd.isna(high):
        return
    axes.hlines(y, max(low, limits[0]), min(high, limits[1]), zorder=3, **look)
    for is_beyond, edge, arrow in ((low < limits[0], limits[0], "<"), (high > limits[1], limits[1], ">")):
        if is_beyond:
            axes.plot(edge, y, marker=arrow, color=look["color"], markersize=6, clip_on=False)


def _number(value: Any) -> str:
    if pd.isna(value):
        return ""
    return "∞" if math.isinf(value) else f"{value:.2g}" if abs(value) < 1 else f"{value:.3g}"


def _claimed(low: float, high: float) -> str:
    return _number(low) if low == high else f"{_number(low)} to {_number(high)}"


def _ours(row: Mapping[Hashable, Any]) -> str:
    """Write ours as "2.10 [1.95, 2.22]"."""
    value = _number(row["value"]) or "no value"
    ends = [_number(row[end]) for end in ("low", "high")]
    return f"{value} [{', '.join(ends)}]" if all(ends) else value


def _legend(page: Page, verdicts: Sequence[str]) -> None:
    line: dict[str, Any] = {"color": _GREY}
    page.legend(
        [
            Line2D([], [], linestyle="none", marker="o", markersize=6.5, label="claimed (bar: a range)", **_CLAIM),
            Line2D([], [], linestyle="none", label="the authors' rerun", **_RERUN),
            Line2D([], [], linewidth=4.5, label="ours: 95 % interval", **line),
            Line2D([], [], linewidth=1.3, label="where one sample of the paper's size lies (95 %)", **line),
            *(
                Line2D([], [], label=verdict, linestyle="none", color=color, marker=marker, markersize=7.5)
                for verdict, (color, marker) in VERDICTS.items()
                if verdict in verdicts
            ),
        ]
    )

"""Every claim of the paper on one page: our value over the paper's, with its interval and the verdict."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Hashable, Mapping
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
from harness.report.plots.elements import paper_handle
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
"""Colour and marker of each verdict on a claim."""
_NEEDED = ("claim", "paper_low", "paper_high", "value", "low", "high", "verdict")
_LINE = 1.45 * SMALL / 72


def draw_claims(claims: pd.DataFrame) -> Page:
    """Draw a row for each claim with a number of the paper's, in the order of the table; x is ours over the paper's.

    A claimed range is a hollow bar, whose geometric mean is the 1 of its row. A claim without a value says so at the
    right. Raises ConfigError if the table lacks a column, or if no claim has a number.
    """
    for column in _NEEDED:
        if column not in claims:
            raise ConfigError(f"the table of claims has no column {column!r}; there are: {', '.join(claims.columns)}")
    rows = claims[claims["paper_low"].notna()].to_dict("records")
    if not rows:
        raise ConfigError("the table of claims has no claim with a number of the paper's: nothing to draw")
    names = [textwrap.wrap(str(row["claim"]), 58) for row in rows]
    heights = [_LINE * max(len(name), 1) + 0.08 for name in names]
    places = np.cumsum(heights) - np.array(heights) / 2
    page = Page("The paper's claims: ours over the paper's value", 1, 1, sum(heights) + 0.7)
    axes = page.flat[0]
    for row, y in zip(rows, places, strict=True):
        _draw_row(axes, row, y)
    axes.axvline(1, color="#444444", linewidth=1.2, zorder=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(sum(heights), 0)
    axes.set_yticks(places, ["\n".join(name) for name in names])
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("Ours over the paper's")
    found = [verdict for verdict in VERDICTS if any(row["verdict"] == verdict for row in rows)]
    page.legend(
        [
            *(
                Line2D([], [], label=verdict, linestyle="none", color=color, marker=marker, markersize=8)
                for verdict, (color, marker) in ((verdict, VERDICTS[verdict]) for verdict in found)
            ),
            paper_handle(),
        ]
    )
    return page


def _draw_row(axes: Axes, row: Mapping[Hashable, Any], y: float) -> None:
    low, high = float(row["paper_low"]), float(row["paper_high"])
    one = math.sqrt(low * high)
    color, marker = VERDICTS.get(row["verdict"], ("#444444", "o"))
    hollow: dict[str, Any] = {"color": "#444444", "markerfacecolor": "none", "zorder": 2}
    if low < high:
        axes.plot([low / one, high / one], [y, y], marker="|", markersize=10, linewidth=1.4, **hollow)
    else:
        axes.plot(1, y, marker="o", markersize=7.5, linestyle="none", **hollow)
    if not pd.isna(row["value"]):
        ends = [end for end in (row["low"], row["high"]) if not pd.isna(end) and math.isfinite(end)]
        if len(ends) == 2:
            axes.hlines(y, ends[0] / one, ends[1] / one, color=color, linewidth=2.2, zorder=3)
        axes.plot(row["value"] / one, y, marker=marker, color=color, markersize=8, linestyle="none", zorder=4)
    axes.text(
        1.01, y, _numbers(row), transform=axes.get_yaxis_transform(), va="center", fontsize=SMALL, color="#333333"
    )


def _numbers(row: Mapping[Hashable, Any]) -> str:
    """Write the row's numbers as "2.10 [1.95, 2.22]; paper 2.03"."""
    text = "no value" if pd.isna(row["value"]) else f"{row['value']:.3g}"
    if not pd.isna(row["low"]) and not pd.isna(row["high"]):
        text += f" [{row['low']:.3g}, {row['high']:.3g}]"
    paper = f"{row['paper_low']:.3g}"
    if row["paper_high"] != row["paper_low"]:
        paper += f" to {row['paper_high']:.3g}"
    return f"{text}; paper {paper}"

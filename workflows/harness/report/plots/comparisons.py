"""Loads of one series over another's as a table of numbers: a row for what differs, a column for each panel.

A cell's colour says how far it is from the paper's number: blue below, orange above, white within a few per cent.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Patch, Rectangle

from fastserve.core.errors import ConfigError
from harness.report.plots.page import Page
from harness.report.plots.style import SMALL, bound
from harness.report.plots.tables import Tables

_COLORS = LinearSegmentedColormap.from_list("below and above", ["#56A5D8", "#B7D7EA", "#FFFFFF", "#FAD7A0", "#E08214"])
"""Okabe and Ito's blue and orange, which readers with a colour vision deficiency can tell apart."""
_FULL = math.log(2)
"""A number half or twice the paper's has the full colour."""
_ROW, _LABEL = 0.27, 3.3
"""Height of a row and width of its label in inches."""
_SOURCES = {"paper": "the paper", "rerun": "the authors' rerun"}


def draw_comparisons(tables: Tables) -> Page:
    """Draw a block of ratios for each policy that others are held over, and one of the loads of the first of them.

    Raises ConfigError without comparisons, or without a table of capacities.
    """
    experiment = tables.experiment
    if tables.capacity is None or tables.capacity.empty or not experiment.get("comparisons"):
        raise ConfigError("figure 'comparisons' draws loads over others: give the experiment comparisons and an slo")
    table = _loads(tables)
    labels = {each["name"]: each.get("paper_system") or each["label"] for each in tables.series}
    blocks = [
        (f"{labels[rows['of'].iloc[0]]} over {labels[rows['over'].iloc[0]]}: load", "ratio", rows)
        for _, rows in table.groupby("policy", sort=False)
    ]
    first = blocks[0][2].drop_duplicates(["panel", "over"])
    blocks.append((f"{labels[first['over'].iloc[0]]} (requests/s)", "load", first))
    heights = [_ROW * (2 + rows["label"].nunique()) + 0.72 for _, _, rows in blocks]
    page = Page(experiment["title"], len(blocks), 1, sum(heights) / len(blocks), height_ratios=heights)
    for axes, (title, column, rows) in zip(page.flat, blocks, strict=True):
        _draw_block(axes, [panel for panel in tables.panels if panel["name"] in set(rows["panel"])], column, rows)
        axes.set_title(title)
    own = {panel["slo"] for panel in tables.panels if panel.get("slo") is not None}
    others = f"; {', '.join(f'{slo:g}' for slo in sorted(own))} where the paper has it" if own else ""
    objective = f"load: {bound(tables.metrics[0], experiment['slo'])}{others}"
    page.legend(
        [
            Patch(facecolor=_COLORS(1.0), label="twice the paper's number, or more"),
            Patch(facecolor=_COLORS(0.0), label="half of it, or less"),
            Patch(facecolor="white", edgecolor="#999999", label=f"as the paper; {objective}"),
        ]
    )
    return page


def _loads(tables: Tables) -> pd.DataFrame:
    """A row a panel and comparison: the load of `over`, the ratio of both loads, and the authors' of each."""
    policies = {each["name"]: each["policy"] for each in tables.series}
    rows = []
    for panel in tables.panels:
        for order, comparison in enumerate(tables.experiment["comparisons"]):
            of, over = (
                tables.capacity_of(panel["name"], comparison[side], tables.metrics[0]) for side in ("of", "over")
            )
            if of is None or over is None:
                continue
            row = {"order": order, "panel": panel["name"], "policy": policies[comparison["over"]], **comparison}
            for name, column in (("", "capacity"), ("paper_", "paper_capacity"), ("rerun_", "rerun_capacity")):
                ends = [math.nan if side.get(column) is None else float(side[column]) for side in (of, over)]
                row |= {f"{name}ratio": ends[0] / ends[1], f"{name}load": ends[1]}
            rows.append(row)
    return pd.DataFrame(rows)


def _draw_block(axes: Axes, panels: Sequence[Mapping[str, Any]], column: str, rows: pd.DataFrame) -> None:
    """Draw the numbers of one column of the table: the authors' first, then a row for each comparison."""
    shown = [(name, rows.groupby("panel")[f"{source}_{column}"].first()) for source, name in _SOURCES.items()]
    labels = rows.sort_values("order", kind="stable")["label"].unique()
    shown += [(str(label), rows[rows["label"] == label].set_index("panel")[column]) for label in labels]
    paper = shown[0][1]
    for y, (_, values) in enumerate(shown):
        for x, panel in enumerate(panels):
            value = values.get(panel["name"], math.nan)
            known = value is not None and not pd.isna(value)
            wanted = paper.get(panel["name"], math.nan)
            if known and not pd.isna(wanted):
                shade = 0.5 + 0.5 * float(np.clip(math.log(value / wanted) / _FULL, -1, 1))
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=_COLORS(shade), edgecolor="white"))
            missing = panel["name"] in values.index
            text = f"{value:.2f}" if known else "?" if missing and y >= len(_SOURCES) else ""
            weight = "bold" if y < len(_SOURCES) else "normal"
            axes.text(x, y, text, ha="center", va="center", fontsize=SMALL, fontweight=weight)
    axes.set_xlim(-0.5, len(panels) - 0.5)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.axhline(len(_SOURCES) - 0.5, color="#444444", linewidth=1.2)
    names = ["\n".join(textwrap.wrap(panel.get("title") or panel["name"], 9)) for panel in panels]
    axes.set_xticks(range(len(panels)), names)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)

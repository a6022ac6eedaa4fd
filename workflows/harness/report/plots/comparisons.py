"""Loads of one series over another's as a table of numbers: a row for what differs, a column for each panel.

A cell's colour says how far it is from the paper's number: blue below, orange above, white within a few per cent.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Patch, Rectangle

from fastserve.core.errors import ConfigError
from harness.analysis.comparisons import comparisons_table
from harness.experiments.experiment import Experiment
from harness.report.plots.page import Page
from harness.report.plots.style import SMALL, bound
from harness.report.plots.tables import Tables

_COLORS = LinearSegmentedColormap.from_list("below and above", ["#2C7FB8", "#B7D7EA", "#FFFFFF", "#FAD7A0", "#E08214"])
"""Okabe and Ito's blue and orange, which readers with a colour vision deficiency can tell apart."""
_FULL = math.log(2)
"""A number half or twice the paper's has the full colour."""
_ROW, _LABEL = 0.27, 3.3
"""Height of a row and width of its label in inches."""
_SOURCES = {"paper": "the paper", "rerun": "the authors' rerun"}


def draw_comparisons(tables: Tables) -> Page:
    """Draw a block of ratios for each policy that others are held over, and one of the loads of the first of them.

    Raises ConfigError for an experiment without comparisons.
    """
    experiment = Experiment.model_validate(tables.experiment)
    table = comparisons_table(experiment, tables.points, tables.reported)
    if table.empty:
        raise ConfigError("figure 'comparisons' needs points of both series of a comparison: there are none")
    labels = {each.name: each.label for each in experiment.series}
    blocks = []
    for _, rows in table.groupby("over_policy", sort=False):
        blocks.append((f"{labels[rows['of'].iloc[0]]} over {_system(experiment, rows)}: load", "ratio", rows))
    first = blocks[0][2].drop_duplicates(["panel", "over"])
    blocks.append((f"{_system(experiment, first)} (requests/s)", "over_load", first))
    heights = [_ROW * (2 + rows["label"].nunique()) + 0.62 for _, _, rows in blocks]
    page = Page(experiment.title, len(blocks), 1, sum(heights) / len(blocks), height_ratios=heights)
    for axes, (title, column, rows) in zip(page.flat, blocks, strict=True):
        _draw_block(axes, [panel for panel in experiment.panels if panel.name in set(rows["panel"])], column, rows)
        axes.set_title(title)
    assert experiment.slo is not None
    own = {panel.slo for panel in experiment.panels if panel.slo is not None}
    others = f"; {', '.join(f'{slo:g}' for slo in sorted(own))} where the paper has it" if own else ""
    objective = f"load: {bound(experiment.metric, experiment.slo)}{others}"
    page.legend(
        [
            Patch(facecolor=_COLORS(1.0), label="twice the paper's number, or more"),
            Patch(facecolor=_COLORS(0.0), label="half of it, or less"),
            Patch(facecolor="white", edgecolor="#999999", label=f"as the paper; {objective}"),
        ]
    )
    return page


def _system(experiment: Experiment, rows: pd.DataFrame) -> str:
    """The name of the system that others are held over."""
    over = next(each for each in experiment.series if each.name == rows["over"].iloc[0])
    return over.paper_system or over.label


def _draw_block(axes: Axes, panels: Sequence[Any], column: str, rows: pd.DataFrame) -> None:
    """Draw the numbers of one column of the table: the authors' first, then a row for each comparison."""
    theirs = {"ratio": "{}_ratio", "over_load": "{}_over_load"}[column]
    shown = [(name, rows.groupby("panel")[theirs.format(source)].first()) for source, name in _SOURCES.items()]
    shown += [(str(label), of.set_index("panel")[column]) for label, of in rows.groupby("label", sort=False)]
    paper = shown[0][1]
    for y, (_, values) in enumerate(shown):
        for x, panel in enumerate(panels):
            value = values.get(panel.name, math.nan)
            known = value is not None and not pd.isna(value)
            wanted = paper.get(panel.name, math.nan)
            if known and not pd.isna(wanted):
                shade = 0.5 + 0.5 * float(np.clip(math.log(value / wanted) / _FULL, -1, 1))
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=_COLORS(shade), edgecolor="white"))
            missing = panel.name in values.index
            text = f"{value:.2f}" if known else "?" if missing and y >= len(_SOURCES) else ""
            weight = "bold" if y < len(_SOURCES) else "normal"
            axes.text(x, y, text, ha="center", va="center", fontsize=SMALL, fontweight=weight)
    axes.set_xlim(-0.5, len(panels) - 0.5)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.axhline(len(_SOURCES) - 0.5, color="#444444", linewidth=1.2)
    names = ["\n".join(textwrap.wrap(panel.title or panel.name, 9)) for panel in panels]
    axes.set_xticks(range(len(panels)), names)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)

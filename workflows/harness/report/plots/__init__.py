"""Figures of experiments, in one style. All measured points are drawn, and no others; no curve is smoothed or extended.

`draw` makes the figure that an experiment names; `flags_of` gives the warnings below it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from fastserve.core.errors import ConfigError
from harness.report.plots.bars import draw_bars
from harness.report.plots.breakdown import draw_breakdown
from harness.report.plots.capacity import draw_capacity
from harness.report.plots.comparisons import draw_comparisons
from harness.report.plots.deciles import draw_deciles
from harness.report.plots.fidelity import draw_fidelity
from harness.report.plots.flags import flags_of
from harness.report.plots.headline import draw_claims
from harness.report.plots.load import draw_load
from harness.report.plots.page import Page, save
from harness.report.plots.ratios import draw_ratios
from harness.report.plots.recorded import draw_agreement, draw_latency, flags_of_recorded
from harness.report.plots.slo import draw_slo_attainment
from harness.report.plots.style import RC
from harness.report.plots.sweep import draw_sweep
from harness.report.plots.tables import Tables

__all__ = [
    "KINDS",
    "RECORDED_VIEWS",
    "draw",
    "draw_headline",
    "draw_page",
    "draw_recorded",
    "figure_of",
    "flags_of",
    "headline_of",
    "page_of",
    "recorded_of",
]

KINDS: Mapping[str, Callable[[Tables], Page]] = {
    "load": draw_load,
    "slo": draw_slo_attainment,
    "capacity": draw_capacity,
    "sweep": draw_sweep,
    "breakdown": draw_breakdown,
    "deciles": draw_deciles,
    "bars": draw_bars,
    "fidelity": draw_fidelity,
    "ratios": draw_ratios,
    "comparisons": draw_comparisons,
}
"""The kinds of figures, by their names in experiments."""
RECORDED_VIEWS: Mapping[str, Callable[[pd.DataFrame, str], Page]] = {
    "latency": draw_latency,
    "agreement": draw_agreement,
}
"""The figures of recorded runs."""


def draw(
    experiment: Mapping[str, Any],
    points: pd.DataFrame,
    capacity: pd.DataFrame | None,
    reported: pd.DataFrame,
    caption: str,
    flags: Sequence[str],
    stem: Path,
) -> list[Path]:
    """Draw the experiment's figure to `stem`.png and `stem`.pdf and return the two paths.

    `points` and `capacity` are the tables of the experiment; a fidelity figure takes the table of comparisons as
    `points`. `reported` has the paper's points, which load and breakdown figures show: columns panel, system, rate,
    value, and quantity for a breakdown. `caption` is written below the figure, and `flags` above the caption in red.
    The same input gives the same bytes.

    Raises ConfigError for an unknown kind of figure and for tables that lack a column, OutputError if the files cannot
    be written.
    """
    figure = figure_of(experiment, points, capacity, reported, caption, flags)
    with matplotlib.rc_context(RC):
        return save(figure, stem)


def figure_of(
    experiment: Mapping[str, Any],
    points: pd.DataFrame,
    capacity: pd.DataFrame | None,
    reported: pd.DataFrame,
    caption: str = "",
    flags: Sequence[str] = (),
) -> Figure:
    """Make the figure that `draw` writes, for a notebook or a test."""
    kind = experiment["figure"]
    if kind not in KINDS:
        raise ConfigError(f"unknown figure {kind!r}; known: {', '.join(KINDS)}")
    with sns.axes_style("whitegrid", rc=RC), matplotlib.rc_context(RC):
        return KINDS[kind](Tables(experiment, points, capacity, reported)).finish(flags, caption)


def draw_headline(claims: pd.DataFrame, stem: Path, loads: bool = False) -> list[Path]:
    """Draw the claims of the paper, or those of `loads`, to `stem`.png and `stem`.pdf and return the two paths.

    Raises ConfigError for a table that lacks a column, OutputError if the files cannot be written.
    """
    figure = headline_of(claims, loads)
    with matplotlib.rc_context(RC):
        return save(figure, stem)


def headline_of(claims: pd.DataFrame, loads: bool = False) -> Figure:
    """Make the figure that `draw_headline` writes."""
    with sns.axes_style("whitegrid", rc=RC), matplotlib.rc_context(RC):
        return draw_claims(claims, loads).finish([], "")


def draw_recorded(view: str, table: pd.DataFrame, title: str, caption: str, stem: Path) -> list[Path]:
    """Draw one of `RECORDED_VIEWS` of recorded runs to `stem`.png and `stem`.pdf and return the two paths.

    `table` is that of `harness.studies.agreement`. Raises ConfigError for an unknown view, OutputError if the files
    cannot be written.
    """
    figure = recorded_of(view, table, title, caption)
    with matplotlib.rc_context(RC):
        return save(figure, stem)


def recorded_of(view: str, table: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Make the figure that `draw_recorded` writes."""
    if view not in RECORDED_VIEWS:
        raise ConfigError(f"unknown figure {view!r} of recorded runs; known: {', '.join(RECORDED_VIEWS)}")
    with sns.axes_style("whitegrid", rc=RC), matplotlib.rc_context(RC):
        return RECORDED_VIEWS[view](table, title).finish(flags_of_recorded(table), caption)


def draw_page(make_page: Callable[[], Page], caption: str, stem: Path) -> list[Path]:
    """Draw the page that `make_page` makes to `stem`.png and `stem`.pdf and return the two paths.

    Raises OutputError if the files cannot be written.
    """
    figure = page_of(make_page, caption)
    with matplotlib.rc_context(RC):
        return save(figure, stem)


def page_of(make_page: Callable[[], Page], caption: str = "") -> Figure:
    """Make the figure that `draw_page` writes."""
    with sns.axes_style("whitegrid", rc=RC), matplotlib.rc_context(RC):
        return make_page().finish([], caption)

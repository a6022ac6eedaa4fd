"""A metric over the request rate, with a panel for each model and data set, the paper's points and the SLO."""

from __future__ import annotations

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from harness.analysis.points import PAPER, RERUN
from harness.report.plots.elements import (
    XAxis,
    below,
    capacity_text,
    draw_slo,
    drawn_values,
    hide_unused,
    paper_handle,
    plot_curve,
    plot_paper,
    rerun_handle,
    series_handles,
    slo_handle,
)
from harness.report.plots.page import Page
from harness.report.plots.style import axis_label, bound, metric_scale, scale_y, series_styles
from harness.report.plots.tables import Tables

CAPACITY_TITLE = "Highest rate within the SLO [95 %] (requests/s)"


def draw_load(tables: Tables) -> Page:
    """Draw panels in rows of three with a common y axis. With an SLO, each panel shows its capacities."""
    metric, slo = tables.metrics[0], tables.experiment.get("slo")
    count = len(tables.panels)
    columns = min(count, 3) if count != 4 else 2
    page = Page(tables.experiment["title"], -(-count // columns), columns, 3.5 if count > 1 else 4.6, sharey=True)
    styles = series_styles(tables.series)
    handles = series_handles(tables, styles)
    extra = [slo_handle(_slo_text(tables, metric, slo))] if slo is not None else []
    if tables.shows(PAPER):
        extra.append(paper_handle())
    if tables.shows(RERUN):
        extra.append(rerun_handle())
    heights = []
    for i, (axes, panel) in enumerate(zip(page.flat, tables.panels, strict=False)):
        draw_panel(axes, tables, panel["name"], metric)
        draw_slo(axes, tables.slo(panel), metric)
        page.name(axes, panel.get("title"))
        axes.set_ylabel(axis_label(metric) if i % columns == 0 else "")
        if count > 1:
            heights.append(capacities_below(axes, tables, panel["name"], metric, columns))
    scale_y(page.flat[:count], drawn_values(page.flat[:count]))
    hide_unused(page.flat, count)
    if count > 1:
        page.legend([*handles, *extra])
        page.grow(page.axes.shape[0] * max(heights))
    else:
        _legend_beside(page.flat[0], tables, handles, extra, metric)
    return page


def draw_panel(axes: Axes, tables: Tables, panel: str, metric: str) -> None:
    """Draw the curves of one panel, and the authors' points if they are of this metric."""
    styles = series_styles(tables.series)
    shows_paper = metric == tables.experiment.get("metric")
    theirs = [
        rate
        for series in tables.series
        for source in (PAPER, RERUN)
        if shows_paper
        for rate in tables.paper(panel, series, source)["rate"]
    ]
    at = XAxis([*tables.xs(panel), *theirs], tables.x_log())
    for series in tables.series:
        style = styles[series["name"]]
        plot_curve(axes, at, tables.curve(panel, series["name"], metric), style, metric_scale(metric))
        if shows_paper:
            plot_paper(axes, tables, panel, series, style)
    at.apply(axes, tables.x_label())


def capacities_below(axes: Axes, tables: Tables, panel: str, metric: str, columns: int) -> float:
    """Write the capacities of a panel's series below it; return their height in inches."""
    styles = series_styles(tables.series)
    entries: list[Artist] = [
        Line2D([], [], label=text, **styles[series["name"]].line())
        for series in tables.series
        if (text := capacity_text(tables, panel, series, metric))
    ]
    if not entries:
        return 0.0
    title = CAPACITY_TITLE if columns < 3 else "Highest rate within the SLO [95 %]"
    return below(axes, entries, title, 1 if columns > 2 else 2)


def _slo_text(tables: Tables, metric: str, slo: float) -> str:
    """Name the SLO, and which panels have another."""
    own: dict[float, list[str]] = {}
    for panel in tables.panels:
        if panel.get("slo") is not None:
            own.setdefault(panel["slo"] * metric_scale(metric), []).append(str(panel.get("title") or panel["name"]))
    others = "".join(f"; {value:g} in {', '.join(titles)}" for value, titles in own.items())
    return f"SLO: {bound(metric, slo)}{others}"


def _legend_beside(axes: Axes, tables: Tables, handles: list[Artist], extra: list[Artist], metric: str) -> None:
    """Draw the legend of a single panel at its right, with the capacities."""
    for series, handle in zip(tables.series, handles, strict=True):
        if text := capacity_text(tables, tables.panels[0]["name"], series, metric):
            handle.set_label(f"{series['label']}\n{text}")
    slo = tables.experiment.get("slo")
    if slo is not None and tables.capacity is not None:
        extra[0].set_label(f"{bound(metric, slo)};\nnumbers: the highest rate\nwithin it [95 %] (requests/s)")
    axes.legend(handles=[*handles, *extra], loc="upper left", bbox_to_anchor=(1.02, 1.0), labelspacing=0.7)

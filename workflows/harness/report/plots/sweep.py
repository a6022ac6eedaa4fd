"""Metrics over another variable than the rate: a starvation bound, a length ratio, the burstiness of arrivals."""

from __future__ import annotations

from harness.report.plots.elements import (
    XAxis,
    dodges,
    draw_slo,
    drawn_values,
    hide_unused,
    plot_curve,
    series_handles,
    slo_handle,
)
from harness.report.plots.page import Page
from harness.report.plots.style import axis_label, bound, metric_scale, scale_y, series_styles
from harness.report.plots.tables import Tables


def draw_sweep(tables: Tables) -> Page:
    """Draw a subplot for each metric: side by side for one panel, else in rows, with a column for each panel.

    Categories such as "never" stand right of the numbers, without a line to them.
    """
    metrics, panels = tables.metrics, tables.panels
    count = len(metrics) * len(panels)
    columns = len(panels) if len(panels) > 1 else {1: 1, 2: 2, 4: 2}.get(count, 3)
    page = Page(tables.experiment["title"], -(-count // columns), columns, 4.4 if count == 1 else 3.4)
    styles = series_styles(tables.series)
    slo = tables.experiment.get("slo")
    cells = [(metric, panel) for metric in metrics for panel in panels]
    shifts = dodges(len(tables.series))
    for axes, (metric, panel) in zip(page.flat, cells, strict=False):
        at = XAxis(tables.xs(panel["name"]), tables.x_log())
        for series, shift in zip(tables.series, shifts, strict=True):
            curve = tables.curve(panel["name"], series["name"], metric)
            plot_curve(axes, at, curve, styles[series["name"]], metric_scale(metric), shift)
        at.apply(axes, tables.x_label())
        if metric == tables.experiment.get("metric"):
            draw_slo(axes, slo, metric)
        axes.set_ylabel(axis_label(metric))
        page.name(axes, panel.get("title"))
    for i in range(len(metrics)):
        same = page.flat[i * len(panels) : (i + 1) * len(panels)]
        scale_y(same, drawn_values(same))
    hide_unused(page.flat, count)
    handles = series_handles(tables, styles)
    if slo is not None and tables.experiment.get("metric") in metrics:
        handles.append(slo_handle(f"SLO: {bound(tables.experiment['metric'], slo)}"))
    page.legend(handles)
    return page

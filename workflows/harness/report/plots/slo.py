"""SLO attainment over the rate: the share of requests within half, once and twice the SLO (the paper's figure 13)."""

from __future__ import annotations

from harness.analysis.derived import SLO_NORMALIZED_S, SLO_SCALES, SLO_TTFT_S
from harness.report.plots.elements import draw_slo, series_handles, slo_handle
from harness.report.plots.load import capacities_below, draw_panel
from harness.report.plots.page import Page
from harness.report.plots.style import metric_scale, series_styles
from harness.report.plots.tables import Tables

_TARGET = 0.95


def draw_slo_attainment(tables: Tables) -> Page:
    """Draw a row for each panel, a column for each SLO, and a dashed line at the target share (`slo`, default 0.95)."""
    target = tables.experiment.get("slo") or _TARGET
    page = Page(tables.experiment["title"], len(tables.panels), len(SLO_SCALES), 2.9, sharey=True)
    heights = [0.0]
    for row, panel in zip(page.axes, tables.panels, strict=True):
        for axes, scale in zip(row, SLO_SCALES, strict=True):
            metric = f"slo_attainment_{scale:g}"
            draw_panel(axes, tables, panel["name"], metric)
            draw_slo(axes, target, metric)
            axes.set_ylim(-2, 104)
            bounds = f"TTFT < {scale * SLO_TTFT_S:g} s, < {scale * SLO_NORMALIZED_S:g} s/token"
            page.name(axes, panel.get("title"), bounds, separator="\n")
            heights.append(capacities_below(axes, tables, panel["name"], metric, len(SLO_SCALES)))
        row[0].set_ylabel("Requests within\nthe SLO (%)")
    page.grow(len(tables.panels) * max(heights))
    target_label = f"{target * metric_scale(metric):g} % of the requests"
    page.legend([*series_handles(tables, series_styles(tables.series)), slo_handle(target_label)])
    return page

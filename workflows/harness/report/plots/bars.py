"""Real runs: a group of bars for each rate, a bar for each series."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.patches import Patch

from harness.report.plots.elements import XAxis
from harness.report.plots.page import Page
from harness.report.plots.style import SMALL, metric_label, metric_scale, series_styles
from harness.report.plots.tables import Tables

METRICS = ("mean_normalized_latency_s", "p95_normalized_latency_s", "output_tokens_per_s")
"""The metrics drawn if the experiment names none."""
_WHISKER: dict[str, Any] = {"ecolor": "#808080", "elinewidth": 1.6, "capsize": 3}


def draw_bars(tables: Tables) -> Page:
    """Draw a row for each panel, a column for each metric; latencies in milliseconds, 95 % intervals over seeds."""
    metrics = tables.experiment.get("metrics") or METRICS
    page = Page(tables.experiment["title"], len(tables.panels), len(metrics), 3.6)
    styles = series_styles(tables.series)
    width = 0.84 / len(tables.series)
    for row, panel in zip(page.axes, tables.panels, strict=True):
        at = XAxis(tables.xs(panel["name"]), even=True)
        for axes, metric in zip(row, metrics, strict=True):
            label, scale = metric_label(metric), metric_scale(metric)
            if "normalized_latency" in metric or "tpot" in metric:
                label, scale = label.replace("(s/token)", "(ms/token)"), 1000.0
            for i, series in enumerate(tables.series):
                curve = tables.curve(panel["name"], series["name"], metric)
                x = np.array([at.of(each) for each in curve.x])
                mean, low, high = (scale * values for values in (curve.mean, curve.low, curve.high))
                style = styles[series["name"]]
                bars = axes.bar(
                    x + (i - (len(tables.series) - 1) / 2) * width,
                    mean,
                    width * 0.94,
                    color=style.color,
                    hatch="//" if style.dashes else None,
                    edgecolor="white",
                    yerr=None if np.isnan(low).all() else np.array([mean - low, high - mean]),
                    error_kw=_WHISKER,
                    zorder=2,
                )
                rotation = 90 if len(tables.series) * len(at.values) > 6 else 0
                axes.bar_label(
                    bars, [_three_digits(value) for value in mean], padding=3, fontsize=SMALL, rotation=rotation
                )
            at.apply(axes, tables.x_label())
            axes.margins(y=0.3 if rotation else 0.15)
            axes.grid(axis="x", visible=False)
            page.name(axes, panel.get("title"), label, separator="\n")
    page.legend(
        [
            Patch(
                facecolor=styles[series["name"]].color,
                hatch="//" if styles[series["name"]].dashes else None,
                edgecolor="white",
                label=series["label"],
            )
            for series in tables.series
        ]
    )
    return page


def _three_digits(value: float) -> str:
    if np.isnan(value):
        return "none"
    return f"{value:#.3g}".rstrip(".") if value < 100 else f"{value:.0f}"

"""Fairness by length: the mean slowdown of requests by output length, in tenths from the shortest to the longest."""

from __future__ import annotations

import numpy as np

from harness.analysis.derived import NUM_DECILES
from harness.report.plots.elements import drawn_values, hide_unused, series_handles
from harness.report.plots.page import Page
from harness.report.plots.style import scale_y, series_styles
from harness.report.plots.tables import Tables, X

DECILES = tuple(range(1, NUM_DECILES + 1))


def draw_deciles(tables: Tables) -> Page:
    """Draw a subplot for each panel and x. Slowdown is completion time over the time alone on an idle machine."""
    cells = [(panel, x) for panel in tables.panels for x in tables.xs(panel["name"])]
    columns = min(len(cells), 3) if len(cells) != 4 else 2
    page = Page(
        tables.experiment["title"], -(-len(cells) // columns), columns, 4.4 if columns == 1 else 3.2, sharey=True
    )
    styles = series_styles(tables.series)
    for i, (axes, (panel, x)) in enumerate(zip(page.flat, cells, strict=False)):
        for series in tables.series:
            mean, low, high = _by_decile(tables, panel["name"], series["name"], x)
            style = styles[series["name"]]
            axes.plot(DECILES, mean, zorder=3, **style.line())
            axes.fill_between(DECILES, low, high, color=style.color, alpha=0.18, linewidth=0, zorder=2)
        axes.set_xticks(DECILES)
        axes.set_xlabel("Tenth of the requests by output length\n(1: shortest, 10: longest)")
        axes.set_ylabel("Mean slowdown\n(× alone on the machine)" if i % columns == 0 else "")
        name, _, unit = tables.x_label().rstrip(")").partition(" (")
        at = f"{name}: {x:g} {unit}".rstrip() if isinstance(x, float) else x
        page.name(axes, panel.get("title"), at, separator="\n")
    scale_y(page.flat[: len(cells)], drawn_values(page.flat[: len(cells)]))
    hide_unused(page.flat, len(cells))
    page.legend(series_handles(tables, styles))
    return page


def _by_decile(tables: Tables, panel: str, series: str, x: X) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over seeds and its interval, [10] each; NaN if the series has no point at x."""
    mean, low, high = (np.full(len(DECILES), np.nan) for _ in range(3))
    for i, decile in enumerate(DECILES):
        curve = tables.curve(panel, series, f"slowdown_decile_{decile}")
        if x in curve.x:
            at = curve.x.index(x)
            mean[i], low[i], high[i] = curve.mean[at], curve.low[at], curve.high[at]
    return mean, low, high

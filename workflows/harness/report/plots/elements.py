"""Elements that several kinds of figures share: an x axis, curves, legend entries, capacities as text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation, Transform, offset_copy

from fastserve.core.errors import ConfigError
from harness.analysis.points import PAPER, RERUN
from harness.report.plots.style import SLO_LINE, SMALL, SeriesStyle, metric_scale, number, rises_to_the_good
from harness.report.plots.tables import Curve, Tables, X, ordered

_HOLLOW = SeriesStyle("#444444", "o", ())


class XAxis:
    """The position of each x: numbers at their value, categories evenly spaced at their right; bars evenly spaced."""

    def __init__(self, xs: Iterable[object], log: bool = False, even: bool = False) -> None:
        """Place all x. Raises ConfigError for a number that a logarithmic axis cannot show."""
        self.values = ordered(list(xs))
        numbers = [] if even else [x for x in self.values if isinstance(x, float)]
        if log and numbers and numbers[0] <= 0:
            raise ConfigError(f"x is {numbers[0]:g}: a logarithmic axis needs numbers above 0; set x.log to false")
        self.numeric = bool(numbers)
        self._log = log and self.numeric
        self._position: dict[X, float] = {x: x for x in numbers}
        scaled = [math.log10(x) if self._log else x for x in numbers]
        step = 0.22 * ((scaled[-1] - scaled[0]) or 1.0) if scaled else 1.0
        last = scaled[-1] if scaled else -step
        for i, category in enumerate(self.values[len(numbers) :]):
            position = last + (i + 1) * step
            self._position[category] = 10**position if self._log else position

    def of(self, x: X) -> float:
        """The position of x in data coordinates."""
        return self._position[x]

    def apply(self, axes: Axes, label: str) -> None:
        """Set scale, ticks and label. Ticks are at the values unless the axis is linear and has numbers only."""
        if self._log:
            axes.set_xscale("log")
        if self._log or not self.numeric or isinstance(self.values[-1], str):
            length = max(6, int(_characters(axes)) // len(self.values) - 1)  # Of the line of a label under its bars.
            labels = {x: f"{x:g}" if isinstance(x, float) else x for x in self.values}
            if not self.numeric:
                labels = {x: "\n".join(textwrap.wrap(label, length)) for x, label in labels.items()}
            shown = self._spaced(labels, _characters(axes))
            axes.set_xticks([self.of(x) for x in shown], [labels[x] for x in shown])
            widest = max(len(line) for label in labels.values() for line in label.split("\n"))
            if not self.numeric and (widest + 1) * len(labels) > _characters(axes):
                axes.tick_params(axis="x", labelrotation=90)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(self._limits())
        axes.set_xlabel("\n".join(textwrap.wrap(label, int(0.95 * _characters(axes)), break_long_words=False)))

    def _limits(self) -> tuple[float, float]:
        """The first and last position with a margin, or from 0 if 0 is near."""
        low, high = min(self._position.values()), max(self._position.values())
        if not self.numeric:
            return low - 0.6, high + 0.6
        if self._log:
            margin = (high / low) ** 0.05 if high > low else 2.0
            return low / margin, high * margin
        margin = 0.04 * (high - low) or 0.5
        return (-margin if 0 <= low < 0.3 * high else low - margin), high + margin

    def _spaced(self, labels: Mapping[X, str], characters: float) -> list[X]:
        """The values to label: all categories, and numbers whose label leaves room for the next label."""
        place = {x: math.log10(p) if self._log else p for x, p in self._position.items()}
        width = (max(place.values()) - min(place.values())) or 1.0
        kept: list[X] = []
        for x in reversed(self.values):
            if kept and self.numeric and isinstance(x, float):
                needed = (len(labels[x]) + len(labels[kept[-1]])) / 2 + 0.3
                if (place[kept[-1]] - place[x]) / width < needed / characters:
                    continue
            kept.append(x)
        return kept[::-1]


def _characters(axes: Axes) -> float:
    """The width of the axes in characters of the smallest text, roughly."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    return axes.get_position().width * figure.get_figwidth() * 72 / (0.63 * SMALL)


def plot_curve(axes: Axes, at: XAxis, curve: Curve, style: SeriesStyle, scale: float = 1.0, dodge: float = 0.0) -> None:
    """Draw a line through a series' numbers with its band, and a point with whiskers at each category.

    `dodge` shifts the points at categories by printer's points, so that several series do not hide each other.
    """
    numeric = np.array([isinstance(x, float) for x in curve.x], dtype=bool)
    positions = np.array([at.of(x) for x in curve.x], dtype=float)
    mean, low, high = (scale * values for values in (curve.mean, curve.low, curve.high))
    axes.plot(positions[numeric], mean[numeric], zorder=3, **style.line())
    axes.fill_between(
        positions[numeric], low[numeric], high[numeric], color=style.color, alpha=0.18, linewidth=0, zorder=2
    )
    if not numeric.all():
        whisker_points(axes, positions[~numeric], mean[~numeric], low[~numeric], high[~numeric], style, dodge)


def whisker_points(
    axes: Axes, x: np.ndarray, mean: np.ndarray, low: np.ndarray, high: np.ndarray, style: SeriesStyle, dodge: float
) -> None:
    """Draw points with whiskers from `low` to `high` (none for NaN), shifted by `dodge` printer's points."""
    where = shifted(axes, dodge)
    axes.vlines(x, low, high, color=style.color, linewidth=1.8, transform=where, zorder=2)
    axes.plot(x, mean, transform=where, zorder=3, **style.points())


def shifted(axes: Axes, points: float) -> Transform:
    """Data coordinates, moved to the right by printer's points."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    return axes.transData + ScaledTranslation(points / 72, 0, figure.dpi_scale_trans)


def dodges(count: int, step: float = 9.0) -> list[float]:
    """Shifts for `count` series, centred, `step` printer's points apart."""
    return [(i - (count - 1) / 2) * step for i in range(count)]


def plot_paper(axes: Axes, tables: Tables, panel: str, series: Mapping[str, Any], style: SeriesStyle) -> None:
    """Draw the paper's points for a series, hollow, and those of its authors' rerun, as crosses."""
    for source, look in ((PAPER, style.hollow()), (RERUN, style.cross())):
        points = tables.paper(panel, series, source)
        if len(points):
            axes.plot(points["rate"].astype(float), points["value"].astype(float), zorder=4, **look)


def drawn_values(axes: Iterable[Axes]) -> np.ndarray:
    """Every y drawn as a line, a point or a band."""
    values: list[np.ndarray] = []
    for each in axes:
        values += [np.asarray(line.get_ydata(), dtype=float) for line in each.lines]
        values += [np.asarray(path.vertices)[:, 1] for found in each.collections for path in found.get_paths()]
    return np.concatenate(values) if values else np.empty(0)


def series_handles(tables: Tables, styles: Mapping[str, SeriesStyle]) -> list[Artist]:
    """A legend entry for each series."""
    return [Line2D([], [], label=each["label"], **styles[each["name"]].line()) for each in tables.series]


def paper_handle() -> Artist:
    """The legend entry of the paper's points."""
    return Line2D([], [], label="hollow: reported by the paper", **_HOLLOW.hollow())


def rerun_handle() -> Artist:
    """The legend entry of the points that the paper's authors measured again."""
    return Line2D([], [], label="crosses: the authors' rerun", **_HOLLOW.cross())


def slo_handle(label: str) -> Artist:
    """The legend entry of the line at the SLO."""
    return Line2D([], [], label=label, **SLO_LINE)


def hide_unused(axes: Sequence[Axes], used: int) -> None:
    """Remove the last axes of a grid that is not full."""
    for each in axes[used:]:
        each.remove()


def below(axes: Axes, handles: Sequence[Artist], title: str, columns: int) -> float:
    """Draw legend entries under a panel, below its x label; return their height in inches."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    legend = axes.legend(
        handles=handles,
        title=title,
        loc="upper left",
        ncols=columns,
        alignment="left",
        labelspacing=0.3,
        columnspacing=1.2,
        handlelength=1.6,
        borderpad=0,
        borderaxespad=0,
        bbox_to_anchor=(0, 0),
        bbox_transform=offset_copy(axes.transAxes, figure, 0, -0.58 - 0.2 * axes.get_xlabel().count("\n"), "inches"),
    )
    return float(legend.get_window_extent().height / figure.dpi) + 0.1


def capacity_text(tables: Tables, panel: str, series: Mapping[str, Any], metric: str) -> str:
    """Write a capacity, its interval and the authors' as "4.0 [3.7, 4.4]; paper 4.9"; empty without a capacity.

    A capacity beyond the measured rates is written as "< lowest" or "> highest".
    """
    row = tables.capacity_of(panel, series["name"], metric)
    if row is None:
        return ""
    lowest, highest = tables.measured(panel, series["name"]) or (math.nan, math.nan)

    def text(value: Any) -> str:
        if not _known(value):
            return "?"
        if math.isfinite(value):
            return number(value)
        return f">{number(highest)}" if value > 0 else f"<{number(lowest)}"

    capacity = capacity_or_bound(tables, panel, series["name"], metric, row)
    found = text(capacity)
    if _known(row["low"]) and _known(row["high"]) and (math.isfinite(capacity) or row["low"] != row["high"]):
        found += f" [{text(row['low'])}, {text(row['high'])}]"
    if _known(row.get("paper_capacity")):
        found += f"; paper {number(row['paper_capacity'])}"
    if _known(row.get("rerun_capacity")):
        found += f"; rerun {number(row['rerun_capacity'])}"
    return found


def capacity_or_bound(tables: Tables, panel: str, series: str, metric: str, row: Mapping[str, Any]) -> float:
    """The capacity; inf or -inf if every or no measured rate meets the SLO; NaN if that is unknown too."""
    if _known(row["capacity"]):
        return float(row["capacity"])
    mean = tables.curve(panel, series, metric).mean
    if not len(mean) or np.isnan(mean).any():
        return math.nan
    within = mean >= row["slo"] if rises_to_the_good(metric) else mean <= row["slo"]
    return math.inf if within.all() else -math.inf if not within[0] else math.nan


def draw_slo(axes: Axes, slo: float | None, metric: str) -> None:
    """Draw the SLO as a dashed line."""
    if slo is not None:
        axes.axhline(slo * metric_scale(metric), zorder=1, **SLO_LINE)


def _known(value: Any) -> bool:
    return value is not None and not math.isnan(value)

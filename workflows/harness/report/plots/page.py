"""The page of a figure: title and legend above, panels, then warnings and provenance below. Nothing overlaps."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from fastserve.core.files import atomic_write
from harness.report.plots.style import SMALL

WIDTH = 12.0
"""Inches."""
_MARGIN = 0.15
_LINE = 1.35 * SMALL / 72
_TITLE_SIZE = 16


class Page:
    """A grid of panels, `axes` [rows, columns], `height` inches a row with its labels.

    `height` may be raised by `grow` before `finish`, which puts everything in its place.
    """

    def __init__(self, title: str, rows: int, columns: int, height: float = 3.2, **grid: Any) -> None:
        self.figure = Figure(figsize=(WIDTH, rows * height), layout="constrained")
        FigureCanvasAgg(self.figure)
        self.axes: np.ndarray = self.figure.subplots(rows, columns, squeeze=False, **grid)
        self._title = textwrap.wrap(title, 84)
        self._body = rows * height
        self._handles: list[Any] = []

    @property
    def flat(self) -> list[Axes]:
        """The panels row by row."""
        return list(self.axes.flat)

    def grow(self, height: float) -> None:
        """Make the part of the page that holds the panels higher, by inches."""
        self._body += height

    def name(self, axes: Axes, *parts: str | None, separator: str = ", ", beside: float = 0.0) -> None:
        """Give a panel its title, made of the given parts and wrapped to the width of its column.

        `beside` is the width in inches that other elements take from the page.
        """
        text = separator.join(part for part in parts if part)
        length = max(8, int(108 * (1 - beside / WIDTH)) // self.axes.shape[1] - 2)
        axes.set_title("\n".join(wrapped for line in text.split("\n") for wrapped in textwrap.wrap(line, length)))

    def legend(self, handles: Sequence[Artist]) -> None:
        """One legend for all panels, between title and panels."""
        self._handles = list(handles)

    def finish(self, flags: Sequence[str], caption: str) -> Figure:
        """Set the page's height and write the texts above and below the panels."""
        figure = self.figure
        legend, legend_height = self._make_legend()
        warnings = [line for flag in flags for line in self._wrapped(f"⚑ {flag}", indent="    ")]
        below = self._wrapped(caption)
        above = 1.3 * _TITLE_SIZE / 72 * len(self._title) + _MARGIN
        header = above + (legend_height + 0.05 if legend else 0.0) + 0.05
        footer = _LINE * (len(warnings) + len(below)) + (2 * _MARGIN if warnings or below else 0.0)
        height = header + self._body + footer
        figure.set_size_inches(WIDTH, height)
        top = height - _MARGIN
        self._write(self._title, top, 1.3 * _TITLE_SIZE / 72, fontsize=_TITLE_SIZE, fontweight="bold")
        if legend:
            legend.set_bbox_to_anchor(Bbox.from_bounds(_MARGIN, height - above, 0, 0), figure.dpi_scale_trans)
        top = footer - _MARGIN / 2
        self._write(warnings, top, _LINE, fontsize=SMALL, color="#B00020")
        self._write(below, top - _LINE * len(warnings), _LINE, fontsize=SMALL, color="#555555")
        engine = figure.get_layout_engine()
        assert engine is not None
        engine.set(rect=(0.006, footer / height, 0.988, self._body / height), h_pad=0.06, w_pad=0.06)  # type: ignore[call-arg]
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # The same places in both files.
        return figure

    def _make_legend(self) -> tuple[Any, float]:
        """Draw the legend in as many columns as fit the page; return its height in inches."""
        if not self._handles:
            return None, 0.0
        count = len(self._handles)
        for rows in range(1, count + 1):
            columns = -(-count // rows)
            by_row = [handle for i in range(columns) for handle in self._handles[i::columns]]
            legend = self.figure.legend(handles=by_row, loc="upper left", ncols=columns, borderpad=0, borderaxespad=0)
            legend.set_in_layout(False)
            size = legend.get_window_extent()
            if size.width / self.figure.dpi <= WIDTH - 2 * _MARGIN or columns == 1:
                break
            legend.remove()
        return legend, size.height / self.figure.dpi

    def _wrapped(self, text: str, indent: str = "") -> list[str]:
        """Wrap the text to the width of the page."""
        lines: list[str] = []
        for length in range(160, 40, -5):
            lines = textwrap.wrap(text, length, subsequent_indent=indent)
            drawn = self.figure.text(0, 0, "\n".join(lines), fontsize=SMALL)
            width = drawn.get_window_extent().width / self.figure.dpi
            drawn.remove()
            if width <= WIDTH - 2 * _MARGIN:
                break
        return lines

    def _write(self, lines: Sequence[str], top: float, step: float, **style: Any) -> None:
        """Write lines from `top` inches downwards."""
        for i, line in enumerate(lines):
            text = self.figure.text(
                _MARGIN, top - i * step, line, va="top", transform=self.figure.dpi_scale_trans, **style
            )
            text.set_in_layout(False)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.pdf, both or none. The same figure gives the same bytes."""
    png, pdf = (stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf"))
    with atomic_write(png) as staged_png, atomic_write(pdf) as staged_pdf:
        figure.savefig(staged_png, format="png", dpi=160)
        figure.savefig(staged_pdf, format="pdf", metadata={"CreationDate": None})
    return [png, pdf]

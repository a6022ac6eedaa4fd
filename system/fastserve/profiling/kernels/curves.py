"""Curves from measured points, and sums of curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from fastserve.core.errors import ConfigError
from fastserve.latency.kernel_latency import Line
from fastserve.latency.kernel_tables import Curve

_SHORTEST_S, _LONGEST_S = 1e-6, 10e-3
"""What one token through one layer can take on any GPU. Outside, a table's times have another unit."""


def curve(seconds: Mapping[int, float]) -> Curve:
    """A curve through these points, in seconds to six digits: tables are no finer."""
    at = sorted(seconds)
    return Curve(tuple(at), tuple(float(f"{seconds[point]:.6g}") for point in at))


def line(seconds: Mapping[int, float]) -> Line:
    """The same, ready to be read, with all digits."""
    at = sorted(seconds)
    return Line([float(point) for point in at], [seconds[point] for point in at])


def sum_of(parts: Iterable[Callable[[int], float]], at: Iterable[int]) -> Curve:
    """The sum of functions at these points: exact between them if they hold every point where a part changes slope."""
    parts = list(parts)
    return curve({point: sum(part(point) for part in parts) for point in at})


def whole_neighbours(points: Iterable[float], least: int, most: float) -> set[int]:
    """The whole numbers around each point, from `least` to `most`.

    A function of whole numbers that is linear between `points` is linear between these.
    """
    around = {each for point in points for each in (int(point), -int(-point // 1))}
    return {least} | {each for each in around if least <= each <= most}


def check_unit(where: str, layer_s: float, unit: str) -> None:
    """Raise ConfigError if one token through one layer takes a time that no GPU takes."""
    if not _SHORTEST_S <= layer_s <= _LONGEST_S:
        raise ConfigError(
            f"{where}: one token takes {layer_s:.3g} s in one layer, where {_SHORTEST_S:g} to {_LONGEST_S:g} s are "
            f"possible; times must be in {unit}"
        )

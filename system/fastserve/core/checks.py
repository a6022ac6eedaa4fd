"""Checks of plain numbers, for values that no definition of options checks."""

from __future__ import annotations

import math

from fastserve.core.errors import ConfigError

_LARGEST_INT = 10**12
"""What arrays and caches can count to."""


def require_int(name: str, value: object, least: int, most: int = _LARGEST_INT) -> None:
    """Raise ConfigError unless `value` is an integer from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
    if value > most:
        raise ConfigError(f"{name} must be an integer of at most {most:,}, got {value}")


def require_positive(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name} must be a finite number above 0, got {value!r}")

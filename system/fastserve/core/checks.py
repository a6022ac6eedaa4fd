"""Checks of values: which values an option or an argument may have, and the error for any other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastserve.core.errors import ConfigError

_LARGEST_INT = 10**12


Check = Callable[[str, Any], None]
"""Takes the name and the value of an option, and raises ConfigError with both unless the value is valid."""


@dataclass(frozen=True)
class Integer:
    """Whole numbers from `least` to `most`."""

    least: int
    most: int | None = None
    """None: what arrays and caches can count to."""

    def __call__(self, name: str, value: Any) -> None:
        """Raise ConfigError for a value out of range or of another type."""
        if not isinstance(value, int) or isinstance(value, bool) or value < self.least:
            raise ConfigError(f"{name} must be an integer of at least {self.least}, got {value!r}")
        most = _LARGEST_INT if self.most is None else self.most
        if value > most:
            raise ConfigError(f"{name} must be an integer of at most {most:,}, got {value}")


@dataclass(frozen=True)
class Positive:
    """Finite numbers above 0."""

    def __call__(self, name: str, value: Any) -> None:
        """Raise ConfigError for a value out of range or of another type."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ConfigError(f"{name} must be a finite number above 0, got {value!r}")


@dataclass(frozen=True)
class OneOf:
    """The `choices` and no other text."""

    choices: tuple[str, ...]

    def __call__(self, name: str, value: Any) -> None:
        """Raise ConfigError for any other value."""
        if value not in self.choices:
            known = " or ".join(self.choices) if len(self.choices) == 2 else f"one of {', '.join(self.choices)}"
            raise ConfigError(f"{name} must be {known}, got {value!r}")


def require_int(name: str, value: object, least: int) -> None:
    """Raise ConfigError unless `value` is an integer of at least `least`."""
    Integer(least)(name, value)


def require_positive(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is a finite number above 0."""
    Positive()(name, value)

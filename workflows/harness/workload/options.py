"""Options of trace and arrival specifications: `name:key=value,key=value`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fastserve.core.errors import ConfigError


def parse_options(owner: str, text: str, defaults: Mapping[str, float]) -> dict[str, float]:
    """Read `key=value,…` over `defaults`. If the default is an int, the value must be one; else it is a finite number.

    `owner` names the specification in errors. Raises ConfigError for an unknown or repeated key, and for a bad value.
    """
    given: dict[str, float] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, separator, value = (piece.strip() for piece in item.partition("="))
        if not separator or key not in defaults:
            valid = ", ".join(defaults) or "none"
            raise ConfigError(f"{owner}: unknown option {item!r}; valid options as key=value: {valid}")
        if key in given:
            raise ConfigError(f"{owner}: option {key!r} is given twice")
        given[key] = _number(owner, key, value, integer=isinstance(defaults[key], int))
    return {**defaults, **given}


def _number(owner: str, key: str, value: str, integer: bool) -> float:
    try:
        number = int(value) if integer else float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{owner}: {key} must be {'an integer' if integer else 'a finite number'}, not {value!r}")
    return number

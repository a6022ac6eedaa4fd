"""Options of trace and arrival specifications: `name:key=value,key=value`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from fastserve.core.errors import ConfigError


def split_options(owner: str, text: str, keys: Collection[str]) -> dict[str, str]:
    """Split `key=value,…` into the values given, as text. Raises ConfigError for an unknown or a repeated key."""
    given: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, separator, value = (piece.strip() for piece in item.partition("="))
        if not separator or key not in keys:
            valid = ", ".join(keys) or "none"
            raise ConfigError(f"{owner}: unknown option {item!r}; valid options as key=value: {valid}")
        if key in given:
            raise ConfigError(f"{owner}: option {key!r} is given twice")
        given[key] = value
    return given


def parse_options(owner: str, text: str, defaults: Mapping[str, float]) -> dict[str, float]:
    """Read `key=value,…` over `defaults`. If the default is an int, the value must be one; else it is a finite number.

    `owner` names the specification in errors. Raises ConfigError for an unknown or repeated key, and for a bad value.
    """
    given = split_options(owner, text, defaults)
    numbers = {key: parse_number(owner, key, value, isinstance(defaults[key], int)) for key, value in given.items()}
    return {**defaults, **numbers}


def parse_number(owner: str, key: str, value: str, integer: bool = False) -> float:
    """Read the value of an option as a finite number or an integer. Raises ConfigError."""
    try:
        number = int(value) if integer else float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{owner}: {key} must be {'an integer' if integer else 'a finite number'}, not {value!r}")
    return number


def parse_choice(owner: str, key: str, value: str, choices: Collection[str]) -> str:
    """Read the value of an option that names one of `choices`. Raises ConfigError."""
    if value not in choices:
        raise ConfigError(f"{owner}: {key} must be one of {', '.join(choices)}, not {value!r}")
    return value

"""Typed options from text: `--set key=value` becomes a frozen dataclass, or an error that names what is valid."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from fastserve.core.errors import ConfigError

T = TypeVar("T")


def build_options(cls: type[T], values: Mapping[str, Any], owner: str) -> T:
    """An instance of the dataclass `cls` from option names and values, text or typed.

    Raises ConfigError for a name the class does not have or a value its type does not take; `owner` says whose
    options these are.
    """
    hints = typing.get_type_hints(cls)
    known = option_names(cls)
    unknown = [name for name in values if name not in known]
    if unknown:
        valid = ", ".join(known) or "none"
        raise ConfigError(f"unknown option {unknown[0]!r} for {owner}; valid options: {valid}")
    return cls(**{name: _convert(value, hints[name], f"{owner}: option {name}") for name, value in values.items()})


def option_names(cls: type) -> list[str]:
    """Names of the options the dataclass `cls` holds."""
    return [field.name for field in dataclasses.fields(cls)]


def _convert(value: Any, hint: Any, what: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        members = typing.get_args(hint)
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            if type(None) in members:
                return None
        else:
            (member,) = (member for member in members if member is not type(None))
            return _convert(value, member, what)
    elif origin is typing.Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        raise ConfigError(f"{what} must be one of {', '.join(map(str, choices))}, got {value!r}")
    elif hint is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif hint in (int, float, str) and not isinstance(value, bool) and value is not None:
        try:
            converted = hint(value)
        except (TypeError, ValueError):
            pass
        else:
            if hint is not int or float(value) == converted:
                return converted
    raise ConfigError(f"{what} must be of type {getattr(hint, '__name__', hint)}, got {value!r}")

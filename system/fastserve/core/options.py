"""Options: each is defined once, as a field of a frozen dataclass with its type, default, help and check.

`fastserve.core.command` makes a command's options of such fields; `build_options` reads them from `--set key=value`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastserve.core.checks import Check
from fastserve.core.errors import ConfigError

T = TypeVar("T")
_KEY = "option"


@dataclass(frozen=True, slots=True)
class Option:
    """What a definition says of an option beside its name, type and default."""

    help: str
    check: Check | None = None
    """Which values it may have; None, as a default, always may."""
    flag: str = ""
    """On the command line, if it is not the name with hyphens and without the unit `_s`."""
    parse: Callable[..., Any] | None = None
    """Makes the value from what the command line gives, whose type is that of the function's parameter."""
    metavar: str | None = None
    show_default: str | bool = True
    """In a command's help, if the default does not speak for itself."""
    envvar: str | None = None
    backends: tuple[str, ...] = ()
    """Backends of `fastbench` that take it; empty: all."""


def option(default: Any, help: str, check: Check | None = None, **more: Any) -> Any:
    """A dataclass field that defines an option; `more` are further fields of `Option`."""
    metadata = {_KEY: Option(help, check, **more)}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def option_of(definition: type, name: str, **changes: Any) -> Any:
    """A dataclass field for the option `name` that another class defines; `changes` are of fields of `Option`."""
    (defined,) = (each for each in dataclasses.fields(definition) if each.name == name)
    known = described(defined)
    assert known is not None, f"{definition.__name__}.{name} defines no option"
    return field(default=defined.default, metadata={_KEY: dataclasses.replace(known, **changes)})


def described(defined: dataclasses.Field[Any]) -> Option | None:
    """What the field's definition says of it; None if it defines no option."""
    return defined.metadata.get(_KEY)


def flag_of(name: str, known: Option) -> str:
    """The option on the command line: `--drain-limit` for `drain_limit_s`."""
    return known.flag or f"--{name.removesuffix('_s').replace('_', '-')}"


def check_options(options: Any) -> None:
    """Raise ConfigError for an option of this dataclass's instance whose value its check refuses."""
    for each in dataclasses.fields(options):
        known, value = described(each), getattr(options, each.name)
        if known is not None and known.check is not None and not (value is None and each.default is None):
            known.check(each.name, value)


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
    """Names of the options that the dataclass `cls` holds."""
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

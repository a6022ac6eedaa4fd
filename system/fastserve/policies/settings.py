"""`--set key=value`: options of the engine and of the policy, told apart and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastserve.core.config import EngineOptions
from fastserve.core.errors import ConfigError
from fastserve.core.options import build_options, option_names
from fastserve.policies.discovery import find_policy


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """`key=value` texts as a mapping."""
    parsed = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set takes key=value, got {setting!r}")
        parsed[key] = value
    return parsed


def resolve_settings(policy: str, settings: Mapping[str, Any]) -> tuple[EngineOptions, dict[str, Any]]:
    """The engine's options, and the policy's settings, checked.

    Raises ConfigError for a value out of range and for a name that is neither's, and then names both's.
    """
    options_class = find_policy(policy).Options
    of_engine, of_policy = option_names(EngineOptions), option_names(options_class)
    for name in settings:
        if name not in of_engine and name not in of_policy:
            raise ConfigError(
                f"unknown option {name!r}; valid for policy {policy!r}: {', '.join(of_policy) or 'none'}; "
                f"for the engine: {', '.join(of_engine)}"
            )
    policy_settings = {name: value for name, value in settings.items() if name in of_policy}
    build_options(options_class, policy_settings, f"policy {policy!r}")
    engine_settings = {name: value for name, value in settings.items() if name in of_engine}
    return build_options(EngineOptions, engine_settings, "the engine"), policy_settings

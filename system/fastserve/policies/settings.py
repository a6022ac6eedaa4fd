"""`--set key=value`: divide the settings into options of the engine and of the policy, and check them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastserve.core.config import EngineOptions
from fastserve.core.errors import ConfigError
from fastserve.core.options import build_options, option_names
from fastserve.policies.discovery import find_policy


def parse_settings(settings: list[str] | None) -> dict[str, str]:
    """Parse texts of the form `key=value`. ConfigError for a text without a key."""
    parsed = {}
    for setting in settings or ():
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set takes key=value, got {setting!r}")
        parsed[key] = value
    return parsed


def resolve_settings(policy: str, settings: Mapping[str, Any]) -> tuple[EngineOptions, dict[str, Any]]:
    """Return the engine's options and the policy's settings, both checked.

    Raises ConfigError for a value out of range, and for a name that neither the engine nor the policy knows.
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

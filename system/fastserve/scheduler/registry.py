"""Policies by name. A new policy is a class with `@register` in a module that is imported."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from fastserve.core.errors import ConfigError
from fastserve.scheduler.policy import Policy

policies: dict[str, type[Policy]] = {}
"""Every policy registered so far; `fastserve.policies.discovery` imports the modules that register them."""

S = TypeVar("S", bound=type[Policy])


def register(cls: S) -> S:
    """Class decorator: make the policy known under `cls.name`. ConfigError if it has no name or the name is taken."""
    if not isinstance(getattr(cls, "name", None), str) or not cls.name:
        raise ConfigError(f"policy class {cls.__module__}:{cls.__qualname__} has no name; give it one: name = 'mine'")
    if not dataclasses.is_dataclass(cls.Options):
        raise ConfigError(f"policy {cls.name!r}: its Options must be a dataclass, not {cls.Options!r}")
    known = policies.get(cls.name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(f"two policies are called {cls.name!r}: {known.__module__} and {cls.__module__}; rename one")
    policies[cls.name] = cls
    return cls

"""Policies by name. A new one is a class with `@register` in a module that gets imported; nothing else to edit."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import Any, TypeVar

from fastserve.config import SchedulerConfig
from fastserve.errors import ConfigError
from fastserve.kvcache import KVCacheManager
from fastserve.latency import LatencyModel
from fastserve.options import build_options
from fastserve.scheduler.base import Scheduler

ENTRY_POINT_GROUP = "fastserve.policies"
"""Packages name the modules that define their policies in this entry-point group."""

_policies: dict[str, type[Scheduler]] = {}
_discovered = False

S = TypeVar("S", bound=type[Scheduler])


def register(cls: S) -> S:
    """Class decorator: make the policy known under `cls.name`."""
    known = _policies.get(cls.name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(f"two policies are called {cls.name!r}: {known.__module__} and {cls.__module__}")
    _policies[cls.name] = cls
    return cls


def list_policies() -> dict[str, type[Scheduler]]:
    """Every policy that can be found, by name."""
    _discover()
    return dict(sorted(_policies.items()))


def find_policy(name: str) -> type[Scheduler]:
    """The policy called `name`, or, written `package.module:Class`, the one there."""
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            policy = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"cannot import policy {name!r}: {error}") from error
        if not (isinstance(policy, type) and issubclass(policy, Scheduler)):
            raise ConfigError(f"policy {name!r} is not a subclass of fastserve.scheduler.Scheduler")
        return policy
    policies = list_policies()
    if name not in policies:
        raise ConfigError(
            f"unknown policy {name!r}; known: {', '.join(policies)}, or package.module:Class for one of your own"
        )
    return policies[name]


def make_scheduler(
    name: str, options: Mapping[str, Any], config: SchedulerConfig, kv: KVCacheManager, latency: LatencyModel
) -> Scheduler:
    """A scheduler of the policy called `name`; ConfigError for an unknown policy or option."""
    policy = find_policy(name)
    return policy(config, kv, latency, build_options(policy.Options, options, f"policy {name!r}"))


def _discover() -> None:
    global _discovered
    if _discovered:
        return
    _discovered = True
    importlib.import_module("fastserve.scheduler.skip_join_mlfq")
    importlib.import_module("fastserve.scheduler.fcfs")
    importlib.import_module("fastserve.scheduler.gittins")
    try:
        # By name, since imports run the other way; without an installed distribution there are no entry points.
        importlib.import_module("baselines")
    except ModuleNotFoundError as error:
        if error.name != "baselines":
            raise
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        entry_point.load()

"""Find policies by name: FastServe's own, the baselines, and policies of installed packages or in a user's file."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastserve.core.config import SchedulerConfig
from fastserve.core.errors import ConfigError, FastServeError
from fastserve.core.options import build_options
from fastserve.kvcache import KVCacheManager
from fastserve.latency import LatencyModel
from fastserve.policies.loading import load_class
from fastserve.scheduler import Policy, Scheduler, registry
from fastserve.scheduler.blame import failed, is_own

ENTRY_POINT_GROUP = "fastserve.policies"
"""Packages name the modules that define their policies in this entry-point group."""

_OURS = ("fcfs", "skip_join_mlfq", "gittins.policy")
_skipped: dict[str, str] = {}
"""Why a package's policies could not be imported, by the name of their entry point."""
_discovered = False


def list_policies() -> dict[str, type[Policy]]:
    """Every policy that can be found, by name."""
    _discover()
    return dict(sorted(registry.policies.items()))


def find_policy(name: str) -> type[Policy]:
    """The policy called `name`, or, written `FILE.py:Class` or `package.module:Class`, the one there.

    Raises ConfigError if there is none, PolicyError if its code cannot be imported.
    """
    if ":" in name or name.endswith(".py"):
        policy = load_class(name)
        if not (isinstance(policy, type) and issubclass(policy, Policy)):
            raise ConfigError(f"policy {name!r} is not a subclass of fastserve.scheduler.Policy")
        if policy.on_add is Policy.on_add:
            raise ConfigError(f"policy {name!r}: its class has no method on_add; define it (docs/add-a-policy.md)")
        if not dataclasses.is_dataclass(policy.Options):
            raise ConfigError(f"policy {name!r}: its Options must be a dataclass, not {policy.Options!r}")
        return policy
    policies = list_policies()
    if name not in policies:
        if name in _skipped:
            raise ConfigError(f"policy {name!r} was skipped: {_skipped[name]}")
        raise ConfigError(
            f"unknown policy {name!r}; known: {', '.join(policies)}, or FILE.py:Class or package.module:Class for one "
            "of your own"
        )
    return policies[name]


def file_name(policy: str) -> str:
    """A policy's name in names of files: of `folder/FILE.py:Class`, `FILE.Class`."""
    where, separator, attribute = policy.rpartition(":")
    if where.endswith(".py"):
        policy = f"{Path(where).stem}{separator}{attribute}"
    return re.sub(r"[^a-zA-Z0-9._-]", ".", policy)


def make_scheduler(
    name: str, options: Mapping[str, Any], config: SchedulerConfig, kv: KVCacheManager, latency: LatencyModel
) -> Scheduler:
    """A scheduler of the policy called `name`; ConfigError for an unknown policy or option, PolicyError if it fails."""
    policy = find_policy(name)
    made = build_options(policy.Options, options, f"policy {name!r}")
    try:
        return Scheduler(policy(config, kv, latency, made))
    except FastServeError:
        raise
    except Exception as error:
        if is_own(policy):
            raise failed(name, error) from error
        raise


def _discover() -> None:
    global _discovered
    if _discovered:
        return
    _discovered = True
    for module in _OURS:
        importlib.import_module(f"fastserve.policies.{module}")
    try:
        # By name, since imports run the other way; without an installed distribution there are no entry points.
        importlib.import_module("baselines")
    except ModuleNotFoundError as error:
        if error.name != "baselines":
            raise
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        _load(entry_point)


def _load(entry_point: importlib.metadata.EntryPoint) -> None:
    """Register what a package offers. A package that fails is named and skipped, so that others can be used."""
    known = dict(registry.policies)
    try:
        entry_point.load()
    except (Exception, SystemExit) as error:
        registry.policies.clear()
        registry.policies.update(known)
        what = str(error) if isinstance(error, FastServeError) else f"{type(error).__name__}: {error}"
        package = entry_point.dist.name if entry_point.dist else entry_point.value
        _skipped[entry_point.name] = f"{entry_point.value} cannot be imported: {' '.join(what.split())}"
        print(
            f"warning: skipped policy {entry_point.name!r} of package {package!r}: {_skipped[entry_point.name]}; mend "
            "or uninstall the package",
            file=sys.stderr,
        )

"""The points of an experiment, and the run of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from fastserve.core.errors import ConfigError
from fastserve.latency import load_profile
from fastserve.policies.discovery import file_name, find_policy
from fastserve.policies.settings import resolve_settings
from fastserve.scheduler.blame import is_own, source_digest
from harness.experiments.experiment import BOTH, SERVED, Experiment, RunPart
from harness.run.config import SAME_TRACE, RunConfig, check_history
from harness.workload.traces import load_trace

_DIGITS = 12
_DEFAULTS = RunConfig()


@dataclass(frozen=True)
class Point:
    """One run of an experiment and its place in it."""

    panel: str
    series: str
    label: str
    x: float | str | None
    config: RunConfig

    @cached_property
    def run(self) -> str:
        """The name of its run: the same for every point that runs the same."""
        return run_name(self.config)


def points_of(experiment: Experiment) -> Iterator[Point]:
    """All points: panel by panel, series by series, then in the order of the table of points, then by seed.

    An experiment that is carried out as a whole has none: on both backends (`harness.studies.fidelity`), or of servers
    (`harness.studies.served`). The history of the experiment or the panel is left out for policies that learn nothing.
    """
    if experiment.backend in (BOTH, SERVED):
        return
    for panel in experiment.panels:
        for series in experiment.series:
            for row in experiment.points_of(series, panel):
                parts = (experiment.run, panel.run, series.run, series.by_panel.get(panel.name, RunPart()), row)
                config = _merged(experiment.backend, series.policy, parts)
                is_common = config.history is not None and series.run.history is None
                if is_common and not find_policy(config.policy).learns:
                    config = replace(config, history=None, history_requests=0)
                for seed in experiment.seeds:
                    yield Point(panel.name, series.name, series.label, row.at, replace(config, seed=seed))


def check_runs(experiment: Experiment, source: Path | str) -> None:
    """Raise ConfigError, with file and series, for an unknown policy, option, trace or profile."""
    checked = set()
    for point in points_of(experiment.model_copy(update={"seeds": experiment.seeds[:1]})):
        if (point.panel, point.series) not in checked:
            checked.add((point.panel, point.series))
            try:
                _check_run(point.config)
            except ConfigError as error:
                panel = f"panel {point.panel!r}, " if point.panel else ""
                raise ConfigError(f"{source}: {panel}series {point.series!r}: {error}") from error


def run_name(config: RunConfig) -> str:
    """Policy and digest of everything that determines the run, as far as it is not the default.

    So a field that RunConfig gets later renames no run. The source of a user's policy is part of it.
    """
    defaults = vars(_DEFAULTS)
    changed = {name: value for name, value in vars(config).items() if value != defaults[name]}
    if config.backend != SERVED and (source := _source(config.policy)):
        changed["policy_source"] = source
    return f"{file_name(config.policy)}-{digest_of(changed)}"


def digest_of(value: Any) -> str:
    """A short digest of plain data, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_DIGITS]


@cache
def _source(policy: str) -> str:
    """Digest of the source of a user's policy; empty for one of ours."""
    found = find_policy(policy)
    return source_digest(found) if is_own(found) else ""


def _merged(backend: str, policy: str, parts: Iterable[RunPart]) -> RunConfig:
    """The parts as one configuration with seed 0: the later ones win, and settings add up."""
    fields: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for part in parts:
        given = {name: getattr(part, name) for name in part.model_fields_set}
        settings |= given.pop("settings", {})
        fields |= given
    prefix, suffix = fields.pop("profile_prefix", ""), fields.pop("profile_suffix", "")
    if fields.get("profile"):
        fields["profile"] = f"{prefix}{fields['profile']}{suffix}"
    if "rate" in fields:
        fields["rate"] = float(fields["rate"])
    fields.pop("x", None)
    return RunConfig(backend=backend, policy=policy, settings=settings, **fields)


def _check_run(config: RunConfig) -> None:
    resolve_settings(config.policy, config.settings)
    load_trace(config.trace)
    check_history(config)
    if config.history not in (None, SAME_TRACE):
        load_trace(config.history)
    if config.profile:
        load_profile(config.profile)
    elif config.backend == "sim":
        raise ConfigError("a simulation needs a profile; `fastbench profiles` lists those shipped")

"""Experiments: what each of their points runs, and in which batches all runs are carried out, each of them once.

An experiment is a mapping as workflows/schemas/experiment.schema.yaml describes it, its defaults filled in. Its points
are panels × series × points × seeds. Each level is a part of a `RunConfig`, and the later ones win.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from fastserve.core.errors import ConfigError
from fastserve.latency import load_profile
from fastserve.policies.discovery import file_name, find_policy
from fastserve.policies.settings import resolve_settings
from fastserve.scheduler.blame import is_own, source_digest
from harness.run.config import SAME_TRACE, RunConfig, check_history
from harness.workload.traces import load_trace

Experiment = Mapping[str, Any]
BOTH, SERVED = "both", "http"
_DIGITS = 12
_TOKENS_A_BATCH = 4_000_000
"""Output tokens of a batch of runs, about: some 20 s of the slowest policies, so that starting up is a small part."""


@dataclass(frozen=True)
class Point:
    """One run of an experiment and its place in it."""

    panel: str
    series: str
    label: str
    x: float | str
    config: RunConfig

    @property
    def run(self) -> str:
        """The name of its run: the same for every point that runs the same."""
        return run_name(self.config)


@dataclass(frozen=True)
class Batch:
    """Runs that one job carries out in one process, one after the other."""

    name: str
    configs: tuple[RunConfig, ...]

    @property
    def runs(self) -> list[str]:
        """Names of the runs."""
        return [run_name(config) for config in self.configs]


_DEFAULTS: Mapping[str, Any] = {
    "note": "",
    "metric": "mean_normalized_latency_s",
    "slo": None,
    "run": {},
    "points": None,
    "panels": None,
    "over": None,
    "targets": (),
}
_PANEL_DEFAULTS: Mapping[str, Any] = {"title": "", "x": None, "run": {}, "points": None, "paper": None}
_SERIES_DEFAULTS: Mapping[str, Any] = {"run": {}, "variant": False, "paper_system": None, "up_to": None, "not_in": ()}


def with_defaults(experiment: Mapping[str, Any]) -> Experiment:
    """The experiment as its file has it, with what it leaves out. One without panels has one, without a name."""
    filled = {**_DEFAULTS, **experiment}
    panels = filled["panels"] or [{"name": "", "paper": filled.get("paper")}]
    return {
        **filled,
        "panels": [{**_PANEL_DEFAULTS, **panel} for panel in panels],
        "series": [{**_SERIES_DEFAULTS, **series} for series in filled["series"]],
    }


def linked(experiments: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Resolve `same_points_as`: what an experiment does not say is taken from the one it names.

    If it lists panels or series, it has those, and each takes what it does not say from its namesake.
    Raises ConfigError for an experiment that is not there.
    """
    resolved = {}
    for name, experiment in experiments.items():
        source_name = experiment.get("same_points_as")
        if source_name is not None and source_name not in experiments:
            known = ", ".join(experiments)
            raise ConfigError(f"experiment {name!r}: same_points_as names {source_name!r}; there are: {known}")
        source = experiments[source_name] if source_name else {}
        resolved[name] = {**source, **experiment}
        for key in ("panels", "series"):
            namesakes = {part.get("name"): part for part in source.get(key, ())}
            if key in experiment:
                resolved[name][key] = [{**namesakes.get(part.get("name"), {}), **part} for part in experiment[key]]
    return resolved


def points_of(experiment: Experiment) -> Iterator[Point]:
    """All points: panel by panel, series by series, then in the order of the table of points, then by seed.

    None of what is carried out as a whole: an experiment on both backends (`harness.studies.fidelity`), or of servers
    (`harness.studies.served`). A history is what came before: a policy that learns nothing, and was given none of its
    own, runs without it.
    """
    if experiment["backend"] in (BOTH, SERVED):
        return
    for panel in experiment["panels"]:
        for series in experiment["series"]:
            if panel["name"] in series["not_in"]:
                continue
            up_to = series["up_to"]
            if isinstance(up_to, Mapping):
                up_to = up_to.get(panel["name"])
            for point in panel["points"] or experiment["points"]:
                if up_to is not None and _x(point) > up_to:
                    continue
                parts = (experiment["run"], panel["run"], {"policy": series["policy"], **series["run"]}, point)
                for seed in experiment["seeds"]:
                    config = _merged(experiment["backend"], seed, parts)
                    is_common = config.history is not None and "history" not in series["run"]
                    if is_common and not find_policy(config.policy).learns:
                        config = replace(config, history=None, history_requests=0)
                    yield Point(panel["name"], series["name"], series["label"], _x(point), config)


def check_experiment(name: str, experiment: Experiment) -> None:
    """Raise ConfigError for what the schema cannot see: names used twice, an unknown policy, profile or setting."""
    names = {
        "panels": [panel["name"] for panel in experiment["panels"]],
        "series": [series["name"] for series in experiment["series"]],
        "labels": [series["label"] for series in experiment["series"]],
    }
    for panel in experiment["panels"]:
        if not (panel["points"] or experiment["points"]):
            raise ConfigError(f"experiment {name!r}, panel {panel['name']!r}: there are no points")
        names |= {f"values of x in panel {panel['name']!r}": [_x(p) for p in panel["points"] or experiment["points"]]}
    for what, values in names.items():
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise ConfigError(f"experiment {name!r}: {what} must differ, {twice[0]!r} is there twice")
    checked = set()
    for point in points_of(experiment):
        if (point.panel, point.series) in checked:
            continue
        checked.add((point.panel, point.series))
        try:
            _check_run(point.config)
        except ConfigError as error:
            raise ConfigError(f"experiment {name!r}, series {point.series!r}: {error}") from error
    over = experiment["over"]
    if experiment["figure"] == "ratios" and (over not in names["series"] or len(names["series"]) < 2):
        known = ", ".join(names["series"])
        raise ConfigError(f"experiment {name!r}: ratios need a series over which to show others, not {over!r}: {known}")
    for target in experiment["targets"]:
        _check_target(name, experiment, target)


def _check_target(name: str, experiment: Experiment, target: Mapping[str, Any]) -> None:
    """Raise ConfigError for a target that names what is not there, or that no point of both its series can meet."""
    where = f"experiment {name!r}, target {target['claim']!r}"
    if experiment["backend"] in (BOTH, SERVED):
        raise ConfigError(f"{where}: targets need backend sim or engine, not {experiment['backend']!r}")
    if not target["metric"]:
        raise ConfigError(f"{where}: metric is empty; name a column of points.csv, such as mean_jct_s")
    names = {parts: [part["name"] for part in experiment[parts]] for parts in ("panels", "series")}
    panels = target.get("panels") or names["panels"]
    sides = target["of"], target["over"]
    for parts, given in (("series", sides), ("panels", panels)):
        unknown = [each for each in given if each not in names[parts]]
        if unknown:
            raise ConfigError(f"{where}: {unknown[0]!r} is none of the {parts}; there are: {', '.join(names[parts])}")
    if sides[0] == sides[1]:
        raise ConfigError(f"{where}: of and over are both {sides[0]!r}; name two series")
    found = {(point.series, point.panel, x_key(point.x)): None for point in points_of(experiment)}
    xs = [x for series, panel, x in found if series == sides[0] and panel in panels and (sides[1], panel, x) in found]
    missing = [x for x in map(x_key, target.get("at") or ()) if x not in xs]
    if missing or not xs:
        at = f" at {missing[0]}" if missing else ""
        there = f"they do at: {', '.join(dict.fromkeys(xs))}" if xs else "see up_to and not_in"
        raise ConfigError(f"{where}: {sides[0]!r} and {sides[1]!r} share no point{at}; {there}")


def run_name(config: RunConfig) -> str:
    """Policy and digest of everything that determines the run, as far as it is not the default.

    So a field that RunConfig gets later renames no run. The source of a user's policy is part of it.
    """
    defaults = asdict(RunConfig())
    changed = {name: value for name, value in asdict(config).items() if value != defaults[name]}
    if config.backend != SERVED and (source := _source(config.policy)):
        changed["policy_source"] = source
    return f"{file_name(config.policy)}-{_digest(changed)}"


def batches_of(experiments: Iterable[Experiment]) -> dict[str, Batch]:
    """Every distinct run in one batch. Batches hold runs of one series, so that another series changes none of them."""
    batches: dict[str, Batch] = {}
    seen: set[str] = set()
    for experiment in experiments:
        groups: dict[str, dict[str, RunConfig]] = {}
        for point in points_of(experiment):
            if point.run not in seen:
                seen.add(point.run)
                groups.setdefault(point.series, {})[point.run] = point.config
        for group in groups.values():
            for configs in _cut(group.values()):
                digest = _digest([run_name(config) for config in configs])
                name = f"{configs[0].backend}-{file_name(configs[0].policy)}-{digest}"
                batches[name] = Batch(name, tuple(configs))
    return batches


def _cut(configs: Iterable[RunConfig]) -> Iterator[list[RunConfig]]:
    """Cut into pieces of bounded work."""
    piece: list[RunConfig] = []
    tokens = 0.0
    for config in configs:
        piece.append(config)
        tokens += config.num_requests * _mean_output(config.trace)
        if tokens >= _TOKENS_A_BATCH:
            yield piece
            piece, tokens = [], 0.0
    if piece:
        yield piece


@cache
def _source(policy: str) -> str:
    """Digest of the source of a user's policy; empty for one of ours."""
    found = find_policy(policy)
    return source_digest(found) if is_own(found) else ""


@cache
def _mean_output(trace: str) -> float:
    return float(load_trace(trace).sample(1000, np.random.default_rng(0))[1].mean())


def _merged(backend: str, seed: int, parts: Iterable[Mapping[str, Any]]) -> RunConfig:
    fields: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    suffix = ""
    for part in parts:
        settings |= part.get("settings", {})
        suffix = part.get("profile_suffix", suffix)
        fields |= {key: value for key, value in part.items() if key not in ("settings", "profile_suffix", "x")}
    if suffix and fields.get("profile"):
        fields["profile"] += suffix
    if fields.get("rate") is not None:
        fields["rate"] = float(fields["rate"])
    return RunConfig(backend=backend, seed=seed, settings=settings, **fields)


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


def x_key(x: Any) -> str:
    """A value of x as text: 4, 4.0 and "4" are one."""
    try:
        return f"{float(x):g}"
    except (TypeError, ValueError):
        return str(x)


def _x(point: Mapping[str, Any]) -> Any:
    return next((point[key] for key in ("x", "rate", "load") if key in point), None)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_DIGITS]

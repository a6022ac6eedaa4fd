"""Fit an engine's own time to measured latencies, by simulating the runs that were measured.

The engine's own time is what an iteration costs beside its kernels: seconds an iteration and seconds a request of it
(`EngineTime`). It is fitted to the points of one policy; those of other policies are then predicted. Between two rates
a latency over load may rise tenfold, so that an error of 2 % in speed is one of 50 % in latency there. So the loss of a
point grows with the square of the error in log up to `DELTA` and linearly beyond (Huber), and no steep point decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from fastserve.core.errors import ConfigError
from fastserve.latency import Profile, load_profile
from fastserve.latency.engine_time import EngineTime
from fastserve.policies.settings import resolve_settings
from fastserve.simulation import simulated_engine
from harness.analysis.points import RERUN
from harness.experiments.experiment import Experiment
from harness.experiments.points import points_of
from harness.run.backends.in_process import arrivals_of
from harness.run.config import RunConfig
from harness.workload.workload import Workload, make_workload

DELTA = 0.2
"""Error in log of a latency from which on the loss grows linearly: a fifth."""
COARSE_STEPS_S = (4e-3, 2e-4)
"""Steps of the coarse grid, in seconds an iteration and seconds a request; it has 4 x 4 points from 0."""
NUM_COARSE = 4
NUM_HALVINGS = 5
"""How often the search round the best point of the grid halves its steps: to 125 us an iteration, 6 us a request."""
_WORKLOAD = ("trace", "arrivals", "rate", "num_requests", "seed")
"""Fields of a run's configuration that determine its requests."""


@dataclass(frozen=True, eq=False)
class MeasuredPoint:
    """A run that was measured, as the simulator is to run it with each seed, and its mean normalized latency."""

    panel: str
    configs: tuple[RunConfig, ...]
    seconds_per_token: float


@dataclass(frozen=True)
class Fit:
    """An engine's own time, and how well it explains the points it was fitted to."""

    engine_time: EngineTime
    loss: float
    """Mean over the points of Huber's loss of the error in log."""
    errors: Mapping[MeasuredPoint, float]
    """log(simulated / measured) of each point."""

    @property
    def rms(self) -> float:
        """Root mean square of the errors in log."""
        return math.sqrt(sum(error**2 for error in self.errors.values()) / len(self.errors))


def measured_points(experiment: Experiment, series: str, reported: pd.DataFrame) -> list[MeasuredPoint]:
    """The points of a series that the authors' rerun has, at the same rate of the same panel.

    The last point of a plotted curve may lie where the plot's frame cuts its line (`at_frame` in the table), at a rate
    that was not run. No experiment has such a rate, so these points are left out. Raises ConfigError if none is left.
    """
    (system,) = {each.paper_system for each in experiment.series if each.name == series} or {None}
    theirs = reported[(reported["source"] == RERUN) & (reported["system"] == system)]
    values = {
        (str(panel), float(rate)): float(value)
        for panel, rate, value in zip(theirs["panel"], theirs["rate"], theirs["value"], strict=True)
    }
    configs: dict[tuple[str, float], list[RunConfig]] = {}
    for point in points_of(experiment):
        if point.series == series and point.config.rate is not None:
            configs.setdefault((point.panel, point.config.rate), []).append(point.config)
    points = [MeasuredPoint(key[0], tuple(configs[key]), values[key]) for key in configs if key in values]
    if not points:
        raise ConfigError(f"series {series!r} of {experiment.title!r} has no rate that the rerun has")
    return points


class Simulations:
    """The measured points, simulated with a profile and various engine times; each is simulated once."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._errors: dict[tuple[MeasuredPoint, EngineTime], float] = {}

    def error(self, point: MeasuredPoint, engine_time: EngineTime) -> float:
        """log(simulated / measured), with the mean over seeds."""
        key = point, engine_time
        if key not in self._errors:
            profile = replace(self._profile, engine_time=engine_time)
            latency = float(np.mean([mean_normalized_latency(config, profile) for config in point.configs]))
            self._errors[key] = math.log(latency / point.seconds_per_token)
        return self._errors[key]

    def loss(self, points: Sequence[MeasuredPoint], engine_time: EngineTime) -> float:
        """Mean over the points of Huber's loss of the error in log."""
        return float(np.mean([huber(self.error(point, engine_time)) for point in points]))


def fit_engine_time(points: Sequence[MeasuredPoint], simulations: Simulations) -> Fit:
    """Fit seconds an iteration and a request to the points; seconds a transfer are 0.

    A coarse grid comes first, then the neighbours of its best point, with ever smaller steps.
    """
    engine_time = search(lambda engine_time: simulations.loss(points, engine_time))
    errors = {point: simulations.error(point, engine_time) for point in points}
    return Fit(engine_time, simulations.loss(points, engine_time), errors)


def search(loss: Callable[[EngineTime], float]) -> EngineTime:
    """The engine time with the smallest loss, to the smallest step."""
    known: dict[tuple[int, int], float] = {}
    finest = 2**NUM_HALVINGS

    def at(place: tuple[int, int]) -> float:
        """The loss at a place, which is counted in the smallest steps; each is computed once."""
        if place not in known:
            known[place] = loss(_engine_time(place))
        return known[place]

    best = min(((finest * i, finest * j) for i in range(NUM_COARSE) for j in range(NUM_COARSE)), key=at)
    step = finest // 2
    while step:
        # Diagonals too: more time an iteration and less a request fit nearly as well, so the valley lies aslant.
        around = [(best[0] + step * i, best[1] + step * j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        nearest = min((place for place in around if min(place) >= 0), key=at)
        if at(nearest) < at(best):
            best = nearest
        else:
            step //= 2
    return _engine_time(best)


def _engine_time(place: tuple[int, int]) -> EngineTime:
    """The engine time at a place of the search."""
    per_iteration_s, per_request_s = (
        round(i * step / 2**NUM_HALVINGS, 9) for i, step in zip(place, COARSE_STEPS_S, strict=True)
    )
    return EngineTime(per_iteration_s, per_request_s, source="fitted")


def huber(error: float) -> float:
    """Half the square up to `DELTA`, and linear beyond."""
    size = abs(error)
    return size**2 / 2 if size <= DELTA else DELTA * (size - DELTA / 2)


def mean_normalized_latency(config: RunConfig, profile: Profile) -> float:
    """Simulate a run with the times of `profile`, writing no files; completion time over output tokens, in seconds."""
    options, policy_options = resolve_settings(config.policy, config.settings)
    engine = simulated_engine(profile, config.policy, policy_options, options)
    jobs = [
        job.metrics for job in engine.run(arrivals_of(_workload(*(getattr(config, name) for name in _WORKLOAD)), None))
    ]
    return float(np.mean([(job.finished_s - job.arrival_s) / job.output_tokens for job in jobs]))


def base_profile(points: Sequence[MeasuredPoint]) -> Profile:
    """The profile that all points are simulated with. Raises ConfigError if they have several."""
    names = sorted({str(config.profile) for point in points for config in point.configs})
    if len(names) != 1:
        raise ConfigError(f"an engine's own time is fitted on one profile, not on {', '.join(names)}")
    return load_profile(names[0])


@lru_cache(maxsize=256)
def _workload(*what: Any) -> Workload:
    """The requests of a run, which are the same for all engine times."""
    return make_workload(*what)

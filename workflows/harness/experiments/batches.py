"""Batches: runs that one job carries out in one process, each distinct run of all experiments once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from fastserve.policies.discovery import file_name
from harness.experiments.experiment import Experiment
from harness.experiments.points import digest_of, points_of
from harness.run.config import RunConfig
from harness.workload.traces import load_trace

_TOKENS_A_BATCH = 4_000_000
"""Output tokens of a batch, about: some 20 s of the slowest policies, so that starting up is a small part."""


@dataclass(frozen=True)
class Batch:
    """Runs that one job carries out in one process, one after the other."""

    name: str
    runs: tuple[str, ...]
    """Names of the runs."""
    configs: tuple[RunConfig, ...]


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
            for piece in _cut(group):
                runs, configs = tuple(piece), tuple(piece.values())
                name = f"{configs[0].backend}-{file_name(configs[0].policy)}-{digest_of(runs)}"
                batches[name] = Batch(name, runs, configs)
    return batches


def _cut(group: Mapping[str, RunConfig]) -> Iterator[dict[str, RunConfig]]:
    """Cut runs, by name, into pieces of bounded work."""
    piece: dict[str, RunConfig] = {}
    tokens = 0.0
    for run, config in group.items():
        piece[run] = config
        tokens += config.num_requests * _mean_output(config.trace)
        if tokens >= _TOKENS_A_BATCH:
            yield piece
            piece, tokens = {}, 0.0
    if piece:
        yield piece


@cache
def _mean_output(trace: str) -> float:
    return float(load_trace(trace).sample(1000, np.random.default_rng(0))[1].mean())

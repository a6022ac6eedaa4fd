"""Batches: runs that one job of the pipeline carries out, each distinct run of all experiments once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastserve.policies.discovery import file_name
from harness.experiments.points import Point, digest_of
from harness.run.config import RunConfig


@dataclass(frozen=True)
class Batch:
    """The runs of one series with one seed, whose results are in one file."""

    name: str
    runs: tuple[str, ...]
    """Names of the runs."""
    configs: tuple[RunConfig, ...]


def batches_of(experiments: Iterable[Iterable[Point]]) -> dict[str, Batch]:
    """Put every distinct run of the experiments, given as their points, into one batch; return batches by name.

    A batch holds runs of one series and one seed, so another series or another seed changes none of them.
    """
    batches: dict[str, Batch] = {}
    seen: set[str] = set()
    for points in experiments:
        groups: dict[tuple[str, int], dict[str, RunConfig]] = {}
        for point in points:
            if point.run not in seen:
                seen.add(point.run)
                groups.setdefault((point.series, point.config.seed), {})[point.run] = point.config
        for group in groups.values():
            runs, configs = tuple(group), tuple(group.values())
            name = f"{configs[0].backend}-{file_name(configs[0].policy)}-{digest_of(runs)}"
            batches[name] = Batch(name, runs, configs)
    return batches

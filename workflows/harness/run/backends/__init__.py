"""Backends: what serves the workload of a run. Each is a module; `make_backend` chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastserve.core.errors import ConfigError
from fastserve.engine import Observer
from harness.run.backends.engine import EngineBackend
from harness.run.backends.http import HttpBackend
from harness.run.backends.interface import Backend, Measurement
from harness.run.backends.sim import SimBackend
from harness.run.config import BACKENDS, RunConfig, check_backend_options

if TYPE_CHECKING:
    from fastserve.runtime.executors.ranks import RankGroup
    from fastserve.runtime.worker import Worker

__all__ = ["Backend", "Measurement", "make_backend"]


def make_backend(
    config: RunConfig, observer: Observer | None, worker: Worker | None, ranks: RankGroup | None
) -> Backend:
    """Make the backend of a run. Raises ConfigError if the configuration, or what is given beside it, does not fit."""
    if config.backend not in BACKENDS:
        raise ConfigError(f"unknown backend {config.backend!r}; known: {', '.join(BACKENDS)}")
    check_backend_options(config)
    if config.backend == "sim":
        if worker is not None or ranks is not None:
            raise ConfigError("a worker or ranks were given for --backend sim, which has none; leave them out")
        return SimBackend(config, observer)
    if config.backend == "engine":
        return EngineBackend(config, observer, worker, ranks)
    if any(each is not None for each in (observer, worker, ranks)):
        raise ConfigError("--backend http sees no engine: leave out --timeline, an observer, a worker and ranks")
    return HttpBackend(config)

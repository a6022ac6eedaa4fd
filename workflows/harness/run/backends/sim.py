"""The simulated backend: an engine in virtual time, with the iteration times of a profile."""

from __future__ import annotations

from dataclasses import replace

from fastserve.core.console import Progress
from fastserve.core.errors import ConfigError
from fastserve.engine import Engine, Observer
from fastserve.latency import load_profile
from fastserve.simulation import RangeGuard, SimulatedExecutor, simulated_engine
from harness.run.backends.in_process import InProcessBackend, arrivals_of
from harness.run.backends.interface import Measurement
from harness.run.config import RunConfig
from harness.run.profile_range import range_meta, range_summary
from harness.run.recorder import RunRecorder, TableSink
from harness.workload.workload import Workload


class SimBackend(InProcessBackend):
    """Simulates the engine. An interrupted simulation measures nothing."""

    def __init__(self, config: RunConfig, observer: Observer | None) -> None:
        super().__init__(config, observer)
        if config.profile is None:
            raise ConfigError("--backend sim needs --profile; `fastbench profiles` lists those shipped")
        self._profile_name = config.profile
        self._range_guard: RangeGuard | None = None

    def serve(self, workload: Workload, recorder: RunRecorder) -> Engine:
        """Serve the workload in virtual time."""
        profile = load_profile(self._profile_name)
        engine = simulated_engine(profile, self.config.policy, self.policy_settings, self.options)
        assert isinstance(engine.executor, SimulatedExecutor)
        self._range_guard = engine.executor.range_guard
        engine.observer = self.observer
        self.teach(engine.scheduler.policy)
        with Progress(self.title, len(workload)) as progress:
            engine.run(arrivals_of(workload, None), progress.advance, recorder)
        return engine

    def measure(self, workload: Workload, tables: TableSink) -> Measurement:
        """Serve the workload, measure, and say how much lies outside the profile's range."""
        measured = super().measure(workload, tables)
        guard = self._range_guard
        return replace(
            measured,
            summary={**measured.summary, **range_summary(guard.outside if guard else None)},
            meta=range_meta(guard.measured if guard else None),
        )

"""The simulated backend: an engine in virtual time, with the iteration times of a profile."""

from __future__ import annotations

from fastserve.core.console import Progress
from fastserve.core.errors import ConfigError
from fastserve.engine import Engine, Observer
from fastserve.latency import load_profile
from fastserve.simulation import simulated_engine
from harness.run.backends.in_process import InProcessBackend, arrivals_of
from harness.run.config import RunConfig
from harness.run.recorder import RunRecorder
from harness.workload.workload import Workload


class SimBackend(InProcessBackend):
    """Simulates the engine. An interrupted simulation measures nothing."""

    def __init__(self, config: RunConfig, observer: Observer | None) -> None:
        super().__init__(config, observer)
        if config.profile is None:
            raise ConfigError("--backend sim needs --profile; `fastbench profiles` lists those shipped")
        self._profile_name = config.profile

    def serve(self, workload: Workload, recorder: RunRecorder) -> Engine:
        """Serve the workload in virtual time."""
        profile = load_profile(self._profile_name)
        engine = simulated_engine(profile, self.config.policy, self.policy_settings, self.options)
        engine.observer = self.observer
        self.teach(engine.scheduler.policy)
        with Progress(self.title, len(workload)) as progress:
            engine.run(arrivals_of(workload, None), progress.advance, recorder)
        return engine

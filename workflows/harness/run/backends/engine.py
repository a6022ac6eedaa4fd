"""The real backend: an engine with a model in this process, or on several ranks."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from fastserve.core.console import Progress
from fastserve.core.errors import ConfigError, RankError
from fastserve.engine import Engine, Observer
from harness.run.backends.in_process import InProcessBackend, arrivals_of
from harness.run.config import RunConfig
from harness.run.recorder import RunRecorder
from harness.workload.workload import Workload

if TYPE_CHECKING:
    from fastserve.runtime.executors.ranks import RankGroup
    from fastserve.runtime.worker import Worker


class EngineBackend(InProcessBackend):
    """Runs the real engine, on the given worker or ranks if any. What was measured before an interruption is kept."""

    def __init__(
        self, config: RunConfig, observer: Observer | None, worker: Worker | None, ranks: RankGroup | None
    ) -> None:
        super().__init__(config, observer)
        if config.model is None:
            raise ConfigError("--backend engine needs --model: a directory in Hugging Face format or a preset")
        self._worker = worker
        self._ranks = ranks

    def serve(self, workload: Workload, recorder: RunRecorder) -> Engine:
        """Serve the workload in real time."""
        from fastserve.llm import LLM  # Here, since a simulation imports this module too.
        from fastserve.runtime.worker.devices import set_threads

        config = self.config
        set_threads(config.torch_threads)
        with (
            LLM(
                **asdict(config.source),
                **asdict(config.parallel),
                **asdict(self.options),
                policy=config.policy,
                policy_options=self.policy_settings,
                profile=config.profile,
                worker=self._worker,
                ranks=self._ranks or config.ranks,
            ) as llm,
            Progress(self.title, len(workload)) as progress,
        ):
            llm.engine.observer = self.observer
            self.teach(llm.engine.scheduler.policy)
            arrivals = list(arrivals_of(workload, llm.model_config.vocab_size))
            with suppress(RankError, KeyboardInterrupt):  # The engine keeps it in `error`; the recorder has the jobs.
                llm.engine.run(arrivals, progress.advance, recorder)
            return llm.engine

"""What the backends with an engine in this process share: settings, history, arrivals, and their measurement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict

from fastserve.core.request import Request, SamplingParams
from fastserve.engine import Arrival, Engine, Observer
from fastserve.policies.settings import resolve_settings
from fastserve.scheduler import Policy
from harness.run.backends.interface import Measurement
from harness.run.config import RunConfig, backend_options
from harness.run.inputs import Lengths, history_of
from harness.run.recorder import CHUNK, RunRecorder, TableSink
from harness.workload.workload import Workload


class InProcessBackend(ABC):
    """A backend whose engine runs in this process."""

    def __init__(self, config: RunConfig, observer: Observer | None) -> None:
        self.config = config
        self.observer = observer
        self.options, self.policy_settings = resolve_settings(config.policy, config.settings)
        self._history: Lengths = []

    @property
    def title(self) -> str:
        """The title of the progress bar."""
        return f"{self.config.policy} on {self.config.backend}"

    def prepare(self) -> None:
        """Draw the history."""
        self._history = history_of(self.config)

    @abstractmethod
    def serve(self, workload: Workload, recorder: RunRecorder) -> Engine:
        """Serve the workload, hand what happens to the recorder, and return the engine."""

    def teach(self, policy: Policy) -> None:
        """Teach the policy the lengths of the requests that finished before."""
        for num_prompt_tokens, num_output_tokens in self._history:
            policy.learn(num_prompt_tokens, num_output_tokens)

    def measure(self, workload: Workload, tables: TableSink) -> Measurement:
        """Serve the workload, measure, and write the rows."""
        recorder = RunRecorder(tables)
        engine = self.serve(workload, recorder)
        if engine.error is not None and not recorder.is_whole:
            raise engine.error
        recorder.finish()
        resolved = {
            **backend_options(self.config),
            "engine": asdict(self.options),
            "policy_options": asdict(engine.scheduler.policy.options),
        }
        resolved["engine"] |= asdict(engine.kv.config)
        del resolved["settings"]
        return Measurement(
            config=self.config,
            resolved=resolved,
            summary=recorder.summary(),
            tally=recorder.tally,
            stopped_by=engine.error,
            error=engine.error,
        )


def arrivals_of(workload: Workload, vocab_size: int | None) -> Iterator[Arrival]:
    """The workload's requests, each with exactly its recorded output length. With a vocabulary, prompts have tokens."""
    params: dict[int, SamplingParams] = {}  # Of each output length: they are slow to make.
    for start in range(0, len(workload), CHUNK):  # Lists of all numbers would be large.
        part = slice(start, start + CHUNK)
        rows = zip(
            workload.arrival_s[part].tolist(),
            workload.prompt_tokens[part].tolist(),
            workload.output_tokens[part].tolist(),
            strict=True,
        )
        for i, (arrival_s, prompt_tokens, output_tokens) in enumerate(rows, start):
            token_ids = [] if vocab_size is None else workload.prompt_token_ids(i, vocab_size)
            if output_tokens not in params:
                params[output_tokens] = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
            yield Arrival(Request(str(i), arrival_s, prompt_tokens, token_ids), params[output_tokens])

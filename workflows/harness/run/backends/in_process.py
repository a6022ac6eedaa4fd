"""What the backends with an engine in this process share: settings, history, arrivals, and their measurement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from fastserve.core.request import Request, RequestStatus, SamplingParams
from fastserve.engine import Arrival, Engine, Job, Observer
from fastserve.policies.settings import resolve_settings
from fastserve.scheduler import Policy
from harness.run.backends.interface import Measurement
from harness.run.config import RunConfig, backend_options
from harness.run.inputs import Lengths, history_of
from harness.run.outcome import Unfinished
from harness.run.results import count, iteration_table, request_table, summarize
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
    def serve(self, workload: Workload) -> tuple[Sequence[Job], Engine]:
        """Serve the workload; return a job for each request, and the engine."""

    def teach(self, policy: Policy) -> None:
        """Teach the policy the lengths of the requests that finished before."""
        for num_prompt_tokens, num_output_tokens in self._history:
            policy.learn(num_prompt_tokens, num_output_tokens)

    def measure(self, workload: Workload) -> Measurement:
        """Serve the workload and measure."""
        jobs, engine = self.serve(workload)
        metrics = [job.metrics for job in jobs]
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
            requests=request_table(metrics),
            iterations=iteration_table(engine.iterations),
            summary=summarize(metrics, count(metrics, len(engine.iterations))),
            unfinished=_unfinished(jobs),
            stopped_by=engine.error,
            error=engine.error,
        )


def arrivals_of(workload: Workload, vocab_size: int | None) -> Iterator[Arrival]:
    """The workload's requests, each with exactly its recorded output length. With a vocabulary, prompts have tokens."""
    rows = zip(
        workload.arrival_s.tolist(), workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True
    )
    for i, (arrival_s, prompt_tokens, output_tokens) in enumerate(rows):
        token_ids = [] if vocab_size is None else workload.prompt_token_ids(i, vocab_size)
        request = Request(str(i), arrival_s, prompt_tokens, token_ids)
        yield Arrival(request, SamplingParams(max_tokens=output_tokens, ignore_eos=True))


def _unfinished(jobs: Sequence[Job]) -> list[Unfinished]:
    return [
        Unfinished(
            status, job.error if status is RequestStatus.REJECTED else f"request {job.request.request_id}: {job.error}"
        )
        for job in jobs
        if (status := job.request.status) is not RequestStatus.FINISHED
    ]

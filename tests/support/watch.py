"""Keeping what an engine did, to compare it with what was worked out by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fastserve.core.request import Request
from fastserve.engine import Engine, EngineView, FinishedTransfer, Job, Observer
from fastserve.kvcache import Direction
from fastserve.scheduler import Iteration


@dataclass(frozen=True, slots=True)
class Ran:
    """One computed iteration: its requests, their levels and numbers of tokens; times in milliseconds."""

    start: float
    end: float
    names: tuple[str, ...]
    levels: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Moved:
    """One ended transfer; times in milliseconds."""

    name: str
    direction: Direction
    start: float
    end: float


@dataclass
class Watch(Observer):
    """An Observer that keeps everything, and every decision beside it."""

    iterations: list[Ran] = field(default_factory=list)
    transfers: list[Moved] = field(default_factory=list)
    stalls: list[tuple[float, float, tuple[str, ...]]] = field(default_factory=list)
    decisions: list[tuple[float, Iteration]] = field(default_factory=list)
    """All that were submitted, those to wait included, and when (ms)."""
    done: list[str] = field(default_factory=list)

    @property
    def batches(self) -> list[tuple[str, ...]]:
        return [ran.names for ran in self.iterations]

    @property
    def swap_outs(self) -> list[str]:
        return [transfer.request.request_id for _, iteration in self.decisions for transfer in iteration.swap_out]

    @property
    def swap_ins(self) -> list[str]:
        return [transfer.request.request_id for _, iteration in self.decisions for transfer in iteration.swap_in]

    @property
    def drops(self) -> list[tuple[str, int]]:
        return [(drop.request.request_id, drop.num_lost_tokens) for _, it in self.decisions for drop in it.dropped]

    def on_iteration(self, engine: EngineView, iteration: Iteration, start_s: float, end_s: float) -> None:
        requests = iteration.requests
        self.iterations.append(
            Ran(
                ms(start_s),
                ms(end_s),
                names(requests),
                tuple(r.level for r in requests),
                iteration.num_scheduled_tokens,
            )
        )

    def on_stall(self, engine: EngineView, stalled: tuple[Request, ...], start_s: float, end_s: float) -> None:
        self.stalls.append((ms(start_s), ms(end_s), names(stalled)))

    def on_transfer(self, finished: FinishedTransfer) -> None:
        transfer = finished.transfer
        self.transfers.append(
            Moved(transfer.request.request_id, transfer.direction, ms(finished.start_s), ms(finished.end_s))
        )

    def on_done(self, job: Job) -> None:
        self.done.append(job.request.request_id)


def watch(engine: Engine) -> Watch:
    """Watch an engine from here on. Iterations are no longer jumped over, which changes nothing else."""
    engine.observer = kept = Watch()
    submit = engine.executor.submit

    def submit_and_keep(iteration: Iteration) -> None:
        kept.decisions.append((ms(engine.clock.now()), iteration))
        submit(iteration)

    engine.executor.submit = submit_and_keep
    return kept


def ms(seconds: float) -> float:
    return round(seconds * 1000, 6)


def names(requests: Iterable[Request]) -> tuple[str, ...]:
    return tuple(request.request_id for request in requests)


def finish_ms(jobs: list[Job]) -> dict[str, float]:
    return {job.request.request_id: ms(job.finished_s) for job in jobs if job.finished_s is not None}

"""One run: a workload served by one policy on one backend, measured and written down."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from fastserve.core.checks import require_int
from fastserve.core.config import EngineOptions
from fastserve.core.console import Progress
from fastserve.core.errors import ConfigError, RankError, ServerError
from fastserve.core.files import check_writable
from fastserve.core.request import Request, RequestStatus, SamplingParams
from fastserve.core.tokenizer import load_tokenizer
from fastserve.engine import Arrival, Engine, Job, Observer, Timeline
from fastserve.latency import load_profile
from fastserve.policies.settings import resolve_settings
from fastserve.scheduler import Scheduler
from harness.run.config import (
    BACKENDS,
    SAME_TRACE,
    RunConfig,
    backend_options,
    check_backend_options,
    check_history,
)
from harness.run.meta import run_meta
from harness.run.outcome import Outcome, Unfinished
from harness.run.results import (
    CLIENT_COLUMNS,
    REQUEST_COLUMNS,
    RunFolder,
    count,
    iteration_table,
    request_table,
    summarize,
    summarize_lateness,
    why_late,
)
from harness.workload.traces import load_trace
from harness.workload.workload import Workload, make_workload

if TYPE_CHECKING:
    from fastserve.runtime.executors.ranks import RankGroup
    from fastserve.runtime.worker import Worker

Lengths = list[tuple[int, int]]
"""Prompt and output tokens of requests."""


def run(
    config: RunConfig,
    out: Path,
    timeline: Path | None = None,
    observer: Observer | None = None,
    worker: Worker | None = None,
    ranks: RankGroup | None = None,
) -> dict[str, Any]:
    """Carry out the run, write its four files to the folder `out`, and return the summary.

    With `timeline`, a trace of the run is written to that file too; nothing else changes. Without it, `observer` is
    told what happens. A real engine takes `worker`, if given, of the same model and with pools at least as large as the
    run's, in place of one of its own, or if it is of several ranks `ranks`: runs one after the other then load the
    model once. A server over HTTP has its engine elsewhere, and takes none of these.
    Raises a FastServeError for bad input, before any work where that can be known; nothing is written then. If a rank
    of the engine is lost, RankError, after the files are written: what was finished is kept, and the rest has failed.
    Likewise KeyboardInterrupt if a real engine is interrupted; a simulation then writes nothing.
    Likewise NothingFinishedError if not one request finishes. If some do not, stderr says how many, and why the first.
    """
    if config.backend not in BACKENDS:
        raise ConfigError(f"unknown backend {config.backend!r}; known: {', '.join(BACKENDS)}")
    check_backend_options(config)
    if config.backend == "http":
        if any(each is not None for each in (timeline, observer, worker, ranks)):
            raise ConfigError("--backend http sees no engine: leave out --timeline, an observer, a worker and ranks")
        return _run_over_http(config, out)
    options, policy_settings = resolve_settings(config.policy, config.settings)
    if config.backend == "sim":
        if worker is not None:
            raise ConfigError("a worker was given for --backend sim, which has none; leave it out")
        if config.profile is None:
            raise ConfigError("--backend sim needs --profile; `fastbench profiles` lists those shipped")
    elif config.model is None:
        raise ConfigError("--backend engine needs --model: a directory in Hugging Face format or a preset")
    check_history(config)
    workload = _workload(config)
    history = _history(config)
    recorder = None
    if timeline is not None:
        check_writable(timeline)
        recorder = Timeline()
    with RunFolder(out) as folder:
        jobs, engine = _serve(config, options, policy_settings, workload, history, recorder or observer, worker, ranks)
        if isinstance(engine.error, KeyboardInterrupt) and not any(
            job.request.status is RequestStatus.FINISHED for job in jobs
        ):
            raise engine.error
        metrics = [job.metrics for job in jobs]
        summary = _what_ran(config) | summarize(metrics, count(metrics, len(engine.iterations)))
        resolved = {
            **backend_options(config),
            "engine": asdict(options),
            "policy_options": asdict(engine.scheduler.options),
        }
        resolved["engine"] |= asdict(engine.kv.config)
        del resolved["settings"]
        outcome = Outcome(len(jobs), _unfinished(jobs), out)
        error = engine.error or outcome.error
        meta = run_meta(resolved, workload, outcome, error)
        _warn(folder.write(request_table(metrics), iteration_table(engine.iterations), summary, meta))
    if timeline is not None and recorder is not None:
        recorder.write(timeline)
    if isinstance(engine.error, KeyboardInterrupt):
        engine.error.add_note(f"wrote {out}: {summary['finished']} of {len(jobs)} finished, the others are aborted")
    _end(error, outcome.warning)
    return summary


def _run_over_http(config: RunConfig, out: Path) -> dict[str, Any]:
    if config.url is None:
        raise ConfigError("--backend http needs --url: the address of a server, such as http://127.0.0.1:8000")
    if config.prompts not in ("ids", "text"):
        raise ConfigError(f"--prompts must be ids or text, not {config.prompts!r}")
    if config.prompts == "text" and config.tokenizer is None:
        raise ConfigError("--prompts text needs --tokenizer: the directory of one in Hugging Face format, or builtin")
    if config.endpoint == "chat" and config.prompts != "text":
        raise ConfigError("--endpoint chat takes no token ids: add --prompts text --tokenizer DIR")
    if config.vocab_size is not None:
        require_int("vocab_size", config.vocab_size, 1)
    from harness.client.replay import DEFAULT_VOCABULARY, ReplayOptions, replay
    from harness.client.request import Wording
    from harness.client.server import contact

    wording = Wording(config.endpoint, config.ignore_eos, config.extra_body)
    options = ReplayOptions(config.max_concurrency, config.drain_limit_s, config.warmup, wording)
    workload = _workload(config)
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer and config.prompts == "text" else None
    server = contact(config.url, config.model)
    if not server.is_listed:  # Whether it has the model should show before the clock starts.
        options = replace(options, warmup=max(options.warmup, 1))
    vocabularies = (server.vocab_size, len(tokenizer) if tokenizer else None)
    vocab_size = config.vocab_size or min(filter(None, vocabularies), default=DEFAULT_VOCABULARY)
    config = replace(
        config,
        policy=server.policy(config.policy),
        model=server.model,
        url=server.public_url,
        vocab_size=vocab_size,
        warmup=options.warmup,
    )
    with RunFolder(out) as folder:
        with Progress(f"{config.policy} over http", len(workload)) as progress:
            replayed = replay(server, workload, options, vocab_size, tokenizer, progress.advance)
        exchanges = replayed.exchanges
        stopped_by = replayed.stopped_by
        if stopped_by and not replayed.finished:
            _raise_again(stopped_by, f"none of {len(exchanges)} requests had finished; nothing was written")
        summary = _what_ran(config) | summarize(exchanges, replayed.counted) | summarize_lateness(replayed.lateness_s)
        until_then = f"{summary['finished']} of {len(exchanges)} requests had finished"
        unfinished = [
            Unfinished(each.outcome, f"request {each.request_id}: {each.error}")
            for each in exchanges
            if each.outcome is not RequestStatus.FINISHED
        ]
        outcome = Outcome(len(exchanges), unfinished, out)
        error = ServerError(f"{stopped_by.name} ended the run: {until_then}") if stopped_by else outcome.error
        warnings = list(filter(None, (why_late([summary]), *replayed.warnings)))
        meta = run_meta(backend_options(config), workload, outcome, error) | {"warnings": warnings} | replayed.meta
        table = request_table(exchanges, REQUEST_COLUMNS | CLIENT_COLUMNS)
        _warn(folder.write(table, iteration_table([]), summary, meta), *warnings)
    if stopped_by:
        _raise_again(stopped_by, f"{until_then}, the others are aborted; wrote {out}")
    _end(outcome.error, outcome.warning)
    return summary


def _end(error: BaseException | None, warning: str) -> None:
    """Raise the error if there is one, else print the warning."""
    if error is not None:
        raise error
    _warn(warning)


def _warn(*warnings: str) -> None:
    """Print those that are not empty."""
    for warning in filter(None, warnings):
        print(f"warning: {warning}", file=sys.stderr)


def _raise_again(signum: signal.Signals, note: str) -> NoReturn:
    """Let a signal that was held back do what it does elsewhere. The note goes with the interruption."""
    try:
        signal.raise_signal(signum)
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        error.add_note(note)
        raise


def read_traces(config: RunConfig) -> None:
    """Read the files a run's requests and history come from, so that later runs do not, and question what they hold.

    Raises a FastServeError for a trace that is unknown, malformed or too short.
    """
    _workload(config)
    _history(config)


def _workload(config: RunConfig) -> Workload:
    workload = make_workload(
        config.trace, config.arrivals, config.rate, config.num_requests, config.seed, config.tokenizer
    )
    _warn(*workload.questions)
    return workload


def _history(config: RunConfig) -> Lengths:
    """Lengths of the requests that finished before, from a random stream of their own: not those of the run."""
    if config.history is None:
        return []
    rng = np.random.default_rng([config.seed, 1])
    trace = config.trace if config.history == SAME_TRACE else config.history
    prompts, outputs = load_trace(trace, config.tokenizer).sample(config.history_requests, rng)
    return list(zip(prompts.tolist(), outputs.tolist(), strict=True))


def _teach(scheduler: Scheduler, history: Lengths) -> None:
    for num_prompt_tokens, num_output_tokens in history:
        scheduler.learn(num_prompt_tokens, num_output_tokens)


def _what_ran(config: RunConfig) -> dict[str, Any]:
    """The first keys of summary.json."""
    return {name: getattr(config, name) for name in ("policy", "backend", "rate", "num_requests", "seed")}


def _serve(
    config: RunConfig,
    options: EngineOptions,
    policy_settings: dict[str, Any],
    workload: Workload,
    history: Lengths,
    observer: Observer | None,
    worker: Worker | None,
    ranks: RankGroup | None,
) -> tuple[list[Job], Engine]:
    title = f"{config.policy} on {config.backend}"
    if config.backend == "sim":
        from fastserve.simulation import simulated_engine

        assert config.profile is not None
        engine = simulated_engine(load_profile(config.profile), config.policy, policy_settings, options)
        engine.observer = observer
        _teach(engine.scheduler, history)
        with Progress(title, len(workload)) as progress:
            return engine.run(_arrivals(workload, None), progress.advance), engine

    import torch

    from fastserve.llm import LLM

    assert config.model is not None
    if config.torch_threads is not None:
        torch.set_num_threads(config.torch_threads)
    with (
        LLM(
            config.model,
            load_format=config.load_format,
            policy=config.policy,
            policy_options=policy_settings,
            device=config.device,
            dtype=config.dtype,
            profile=config.profile,
            worker=worker,
            tensor_parallel_size=config.tensor_parallel_size,
            pipeline_parallel_size=config.pipeline_parallel_size,
            stage_layers=config.stage_layers,
            ranks=ranks or config.ranks,
            **asdict(options),
        ) as llm,
        Progress(title, len(workload)) as progress,
    ):
        llm.engine.observer = observer
        _teach(llm.engine.scheduler, history)
        arrivals = list(_arrivals(workload, llm.model_config.vocab_size))
        with suppress(RankError, KeyboardInterrupt):  # In `engine.error`, and what was done until then in `last_run`.
            llm.engine.run(arrivals, progress.advance)
        return llm.engine.last_run, llm.engine


def _unfinished(jobs: Sequence[Job]) -> list[Unfinished]:
    return [
        Unfinished(
            status, job.error if status is RequestStatus.REJECTED else f"request {job.request.request_id}: {job.error}"
        )
        for job in jobs
        if (status := job.request.status) is not RequestStatus.FINISHED
    ]


def _arrivals(workload: Workload, vocab_size: int | None) -> Iterator[Arrival]:
    """The workload's requests; each generates exactly its recorded length. With a vocabulary, prompts are made up."""
    rows = zip(
        workload.arrival_s.tolist(), workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True
    )
    for i, (arrival_s, prompt_tokens, output_tokens) in enumerate(rows):
        token_ids = [] if vocab_size is None else workload.prompt_token_ids(i, vocab_size)
        request = Request(str(i), arrival_s, prompt_tokens, token_ids)
        yield Arrival(request, SamplingParams(max_tokens=output_tokens, ignore_eos=True))

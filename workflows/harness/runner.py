"""One run: a workload served by one policy on one backend, measured and written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.config import EngineOptions
from fastserve.console import Progress
from fastserve.engine import Arrival, Engine, Observer
from fastserve.errors import ConfigError, RankError
from fastserve.files import check_writable
from fastserve.job import Job
from fastserve.latency import load_profile
from fastserve.options import build_options, option_names
from fastserve.request import Request, RequestStatus, SamplingParams
from fastserve.scheduler import find_policy
from fastserve.timeline import Timeline
from harness.meta import run_meta
from harness.results import RunFolder, iteration_table, request_table, summarize
from harness.workload import Workload, make_workload

if TYPE_CHECKING:
    from fastserve.executor.ranks import RankGroup
    from fastserve.worker import Worker

BACKENDS = ("sim", "engine")


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run. `settings` are the `--set` options: of the engine or of the policy."""

    backend: str = "sim"
    policy: str = "fastserve"
    trace: str = "sharegpt"
    arrivals: str = "poisson"
    rate: float | None = None
    num_requests: int = 400
    seed: int = 0
    profile: str | None = None
    model: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    load_format: str = "auto"
    tokenizer: str | None = None
    torch_threads: int | None = None
    """Threads torch computes with; None leaves it its own choice."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    stage_layers: tuple[int, ...] | None = None
    """Layers of each stage; None: as many as give each the same weight."""
    ranks: str | None = None
    """HOST:PORT at which the engine waits for ranks that torchrun starts; None: it starts them itself."""
    settings: Mapping[str, Any] = field(default_factory=dict)


_OF_AN_ENGINE = {
    name: RunConfig.__dataclass_fields__[name].default
    for name in (
        "model", "device", "dtype", "load_format", "torch_threads", "tensor_parallel_size", "pipeline_parallel_size",
        "stage_layers", "ranks",
    )
}  # fmt: skip
"""What only a real engine takes, with the defaults."""


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
    model once.
    Raises a FastServeError for bad input, before any work where that can be known; nothing is written then. If a rank
    of the engine is lost, RankError, after the files are written: what was finished is kept, and the rest has failed.
    """
    options, policy_settings = resolve_settings(config.policy, config.settings)
    if config.backend == "sim":
        if worker is not None:
            raise ConfigError("a worker was given for --backend sim, which has none; leave it out")
        _refuse(config, "engine", _OF_AN_ENGINE)
        if config.profile is None:
            raise ConfigError("--backend sim needs --profile; `fastbench profiles` lists those shipped")
    elif config.backend == "engine":
        if config.model is None:
            raise ConfigError("--backend engine needs --model: a directory in Hugging Face format or a preset")
    else:
        raise ConfigError(f"unknown backend {config.backend!r}; known: {', '.join(BACKENDS)}")
    workload = make_workload(
        config.trace, config.arrivals, config.rate, config.num_requests, config.seed, config.tokenizer
    )
    recorder = None
    if timeline is not None:
        check_writable(timeline)
        recorder = Timeline()
    with RunFolder(out) as folder:
        jobs, engine = _serve(config, options, policy_settings, workload, recorder or observer, worker, ranks)
        metrics = [job.metrics for job in jobs]
        summary = {
            "policy": config.policy,
            "backend": config.backend,
            "rate": config.rate,
            "num_requests": config.num_requests,
            "seed": config.seed,
            **summarize(metrics, len(engine.iterations)),
        }
        resolved = {**asdict(config), "engine": asdict(options), "policy_options": asdict(engine.scheduler.options)}
        resolved["engine"] |= asdict(engine.kv.config)
        del resolved["settings"]
        rejected = [job.error for job in jobs if job.request.status is RequestStatus.REJECTED]
        folder.write(
            request_table(metrics),
            iteration_table(engine.iterations),
            summary,
            run_meta(resolved, workload, rejected, engine.error),
        )
    if timeline is not None and recorder is not None:
        recorder.write(timeline)
    if engine.error is not None:
        raise engine.error
    return summary


def resolve_settings(policy: str, settings: Mapping[str, Any]) -> tuple[EngineOptions, dict[str, Any]]:
    """The engine's options, and the policy's settings, checked.

    Raises ConfigError for a value out of range and for a name that is neither's, and then names both's.
    """
    options_class = find_policy(policy).Options
    of_engine, of_policy = option_names(EngineOptions), option_names(options_class)
    for name in settings:
        if name not in of_engine and name not in of_policy:
            raise ConfigError(
                f"unknown option {name!r}; valid for policy {policy!r}: {', '.join(of_policy) or 'none'}; "
                f"for the engine: {', '.join(of_engine)}"
            )
    policy_settings = {name: value for name, value in settings.items() if name in of_policy}
    build_options(options_class, policy_settings, f"policy {policy!r}")
    engine_settings = {name: value for name, value in settings.items() if name in of_engine}
    return build_options(EngineOptions, engine_settings, "the engine"), policy_settings


def _serve(
    config: RunConfig,
    options: EngineOptions,
    policy_settings: dict[str, Any],
    workload: Workload,
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
        arrivals = list(_arrivals(workload, llm.model_config.vocab_size))
        with suppress(RankError):  # In `engine.error`, and what was done until then in `last_run`.
            llm.engine.run(arrivals, progress.advance)
        return llm.engine.last_run, llm.engine


def _arrivals(workload: Workload, vocab_size: int | None) -> Iterator[Arrival]:
    """The workload's requests; each generates exactly its recorded length. With a vocabulary, prompts are made up."""
    rows = zip(
        workload.arrival_s.tolist(), workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True
    )
    for i, (arrival_s, prompt_tokens, output_tokens) in enumerate(rows):
        token_ids = [] if vocab_size is None else workload.prompt_token_ids(i, vocab_size)
        request = Request(str(i), arrival_s, prompt_tokens, token_ids)
        yield Arrival(request, SamplingParams(max_tokens=output_tokens, ignore_eos=True))


def _refuse(config: RunConfig, backend: str, defaults: Mapping[str, object]) -> None:
    for name, default in defaults.items():
        if getattr(config, name) != default:
            raise ConfigError(f"--{name.replace('_', '-')} applies to --backend {backend} only")

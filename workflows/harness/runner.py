"""One run: a workload served by one policy on one backend, measured and written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.config import EngineOptions
from fastserve.console import Progress
from fastserve.engine import Arrival, Engine, Observer
from fastserve.errors import ConfigError
from fastserve.files import check_writable
from fastserve.job import Job
from fastserve.latency import load_profile
from fastserve.options import build_options, option_names
from fastserve.request import Request, SamplingParams
from fastserve.scheduler import find_policy
from fastserve.timeline import Timeline
from harness.meta import run_meta
from harness.results import RunFolder, iteration_table, request_table, summarize
from harness.workload import Workload, make_workload

if TYPE_CHECKING:
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
    settings: Mapping[str, Any] = field(default_factory=dict)


def run(
    config: RunConfig,
    out: Path,
    timeline: Path | None = None,
    observer: Observer | None = None,
    worker: Worker | None = None,
) -> dict[str, Any]:
    """Carry out the run, write its four files to the folder `out`, and return the summary.

    With `timeline`, a trace of the run is written to that file too; nothing else changes. Without it, `observer` is
    told what happens. A real engine takes `worker`, if given, of the same model and with pools at least as large as the
    run's, in place of one of its own: runs one after the other then load the model once.
    Raises a FastServeError for bad input, before any work where that can be known; nothing is written then.
    """
    options, policy_settings = resolve_settings(config.policy, config.settings)
    if config.backend == "sim":
        if worker is not None:
            raise ConfigError("a worker was given for --backend sim, which has none; leave it out")
        _refuse(config, "engine", model=None, device="cpu", dtype="float32", load_format="auto", torch_threads=None)
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
        jobs, engine = _serve(config, options, policy_settings, workload, recorder or observer, worker)
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
        rejected = [job.error for job in jobs if job.error]
        folder.write(
            request_table(metrics),
            iteration_table(engine.iterations),
            summary,
            run_meta(resolved, workload, rejected),
        )
    if timeline is not None and recorder is not None:
        recorder.write(timeline)
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
            **asdict(options),
        ) as llm,
        Progress(title, len(workload)) as progress,
    ):
        llm.engine.observer = observer
        arrivals = list(_arrivals(workload, llm.model_config.vocab_size))
        return llm.engine.run(arrivals, progress.advance), llm.engine


def _arrivals(workload: Workload, vocab_size: int | None) -> Iterator[Arrival]:
    """The workload's requests; each generates exactly its recorded length. With a vocabulary, prompts are made up."""
    rows = zip(
        workload.arrival_s.tolist(), workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True
    )
    for i, (arrival_s, prompt_tokens, output_tokens) in enumerate(rows):
        token_ids = [] if vocab_size is None else workload.prompt_token_ids(i, vocab_size)
        request = Request(str(i), arrival_s, prompt_tokens, token_ids)
        yield Arrival(request, SamplingParams(max_tokens=output_tokens, ignore_eos=True))


def _refuse(config: RunConfig, backend: str, **defaults: object) -> None:
    for name, default in defaults.items():
        if getattr(config, name) != default:
            raise ConfigError(f"--{name.replace('_', '-')} applies to --backend {backend} only")

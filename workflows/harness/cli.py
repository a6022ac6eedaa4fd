"""The `fastbench` command: run a benchmark, find a capacity, or list what there is to run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastserve.core.command import Version, new_app
from fastserve.core.console import parse_stage_layers, run_app
from fastserve.core.errors import ConfigError
from fastserve.core.options import option_names
from fastserve.latency import list_profiles, load_profile
from fastserve.policies.discovery import list_policies
from fastserve.policies.settings import parse_settings
from harness.analysis.capacity_result import Objective
from harness.analysis.capacity_search import find_capacity
from harness.client.request import parse_extra_body
from harness.run.config import RunConfig
from harness.run.folders import default_capacity_folder, default_folder
from harness.run.runner import run as run_benchmark
from harness.workload.traces import list_traces

app = new_app()


@app.callback()
def fastbench(version: Version = False) -> None:
    """Benchmark LLM serving schedulers, in simulation, on a real engine or on a server."""


Backend = Annotated[
    str, typer.Option(help="sim: virtual time from a profile; engine: a real model; http: a server elsewhere.")
]
Policy = Annotated[
    str,
    typer.Option(
        help="See `fastbench policies`, or FILE.py:Class or package.module:Class.",
        show_default="fastserve; http: the server's own",
    ),
]
Trace = Annotated[str, typer.Option(help="Request lengths: see `fastbench traces`.")]
Arrivals = Annotated[str, typer.Option(help="poisson, gamma:cv=4, constant or trace.")]
History = Annotated[
    str | None,
    typer.Option(
        metavar="TRACE",
        help="Lengths of requests that finished earlier (same: of --trace), taught to a policy that learns.",
    ),
]
HistoryRequests = Annotated[int, typer.Option(help="How many requests of --history are taught.")]
Profile = Annotated[str | None, typer.Option(help="Latency profile: see `fastbench profiles`, or a .json.")]
Model = Annotated[str | None, typer.Option(help="Model directory or preset (engine); name it is served under (http).")]
Device = Annotated[str, typer.Option(help="cpu or cuda (engine).")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16 (engine).")]
LoadFormat = Annotated[str, typer.Option(help="auto, or dummy for random weights (engine).")]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="Directory of a tokenizer, or builtin, to count a trace's text, and for --prompts text."),
]
TorchThreads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Threads torch computes with (engine); its own choice if not given.")
]
TensorParallel = Annotated[int, typer.Option(help="Ranks that share each layer (engine).")]
PipelineParallel = Annotated[int, typer.Option(help="Stages that the layers are divided into (engine).")]
StageLayers = Annotated[
    str | None, typer.Option(metavar="N,N,...", help="Layers of each stage (engine); of equal weight if not given.")
]
RanksAddress = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Wait here for ranks started by torchrun (engine); else they are started."),
]
Url = Annotated[str | None, typer.Option(help="Address of an OpenAI-compatible server (http).")]
Prompts = Annotated[str, typer.Option(help="ids, or text for servers that take no token ids (http).")]
VocabSize = Annotated[
    int | None,
    typer.Option(min=1, help="Token ids sent are below it (http).", show_default="the server's, or else 1000"),
]
MaxConcurrency = Annotated[
    int | None, typer.Option(min=1, help="Requests under way at a time (http); those kept back are late.")
]
DrainLimit = Annotated[
    float, typer.Option(min=0, metavar="SECONDS", help="Time after the last arrival to finish in, else aborted (http).")
]
Warmup = Annotated[int, typer.Option(min=0, help="Short requests before the clock starts, not recorded (http).")]
Endpoint = Annotated[str, typer.Option(help="completions, or chat, which needs --prompts text (http).")]
NoIgnoreEos = Annotated[
    bool,
    typer.Option("--no-ignore-eos", help="Let the model end its outputs, for servers that refuse the field (http)."),
]
ExtraBody = Annotated[
    str | None, typer.Option(metavar="JSON", help="Merged into every request; null removes a field (http).")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Option of the engine or the policy.")
]


@app.command()
def run(
    backend: Backend = "sim",
    policy: Policy = "",
    trace: Trace = "sharegpt",
    arrivals: Arrivals = "poisson",
    rate: Annotated[float | None, typer.Option(help="Requests per second; optional with trace arrivals.")] = None,
    num_requests: Annotated[int, typer.Option(help="Requests to serve.")] = 400,
    seed: Annotated[int, typer.Option(help="Same seed, same requests, for every policy.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results.", show_default="results/BACKEND-POLICY-TRACE-RATE-seedSEED"),
    ] = None,
    timeline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a trace of the run, to open in ui.perfetto.dev.")
    ] = None,
    history: History = None,
    history_requests: HistoryRequests = 0,
    profile: Profile = None,
    model: Model = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    load_format: LoadFormat = "auto",
    tokenizer: Tokenizer = None,
    torch_threads: TorchThreads = None,
    tensor_parallel_size: TensorParallel = 1,
    pipeline_parallel_size: PipelineParallel = 1,
    stage_layers: StageLayers = None,
    ranks: RanksAddress = None,
    url: Url = None,
    prompts: Prompts = "ids",
    vocab_size: VocabSize = None,
    max_concurrency: MaxConcurrency = None,
    drain_limit: DrainLimit = 600.0,
    warmup: Warmup = 0,
    endpoint: Endpoint = "completions",
    no_ignore_eos: NoIgnoreEos = False,
    extra_body: ExtraBody = None,
    set_: Settings = None,
) -> None:
    """Serve a workload and write requests.parquet, iterations.parquet, summary.json and meta.json."""
    config = RunConfig(
        backend=backend,
        policy=policy,
        trace=trace,
        arrivals=arrivals,
        rate=rate,
        num_requests=num_requests,
        seed=seed,
        history=history,
        history_requests=history_requests,
        profile=profile,
        model=model,
        device=device,
        dtype=dtype,
        load_format=load_format,
        tokenizer=tokenizer,
        torch_threads=torch_threads,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        stage_layers=parse_stage_layers(stage_layers),
        ranks=ranks,
        url=url,
        prompts=prompts,
        vocab_size=vocab_size,
        max_concurrency=max_concurrency,
        drain_limit_s=drain_limit,
        warmup=warmup,
        endpoint=endpoint,
        ignore_eos=not no_ignore_eos,
        extra_body=parse_extra_body(extra_body),
        settings=parse_settings(set_ or []),
    )
    folder = out or default_folder(config)
    summary = run_benchmark(config, folder, timeline)
    print(f"{summary['finished']} finished, {summary['failed']} failed in {summary['duration_s']:.1f} s")
    for name, label, unit in (
        ("mean_normalized_latency_s", "mean normalized latency", "s/token"),
        ("p95_normalized_latency_s", "P95 normalized latency", "s/token"),
        ("mean_jct_s", "mean job completion time", "s"),
        ("output_tokens_per_s", "throughput", "tokens/s"),
    ):
        if summary[name] is not None:
            print(f"{label:24} {summary[name]:10.4g} {unit}")
    print(f"wrote {folder}")
    if timeline:
        print(f"wrote {timeline}")


@app.command()
def capacity(
    slo: Annotated[float, typer.Option(help="Bound on the metric, in its unit: s, or s/token.")],
    metric: Annotated[
        str, typer.Option(help="A latency of summary.json: mean_, p50_, p90_, p95_ or p99_ of a quantity.")
    ] = "mean_normalized_latency_s",
    backend: Backend = "sim",
    policy: Policy = "",
    trace: Trace = "sharegpt",
    arrivals: Arrivals = "poisson",
    num_requests: Annotated[
        int,
        typer.Option(
            help="Requests of every run, at every rate. Few requests are a burst: what they queue up drains after the "
            "last arrival, so that they meet the SLO at a rate which the system does not sustain."
        ),
    ] = 400,
    seeds: Annotated[str, typer.Option(help="Sets of requests, with commas between; each is run at each rate.")] = (
        "0,1,2,3,4"
    ),
    low: Annotated[float, typer.Option(help="Lowest rate, in requests/s, from which rates are doubled.")] = 0.5,
    high: Annotated[float, typer.Option(help="Highest rate that is tried.")] = 1000.0,
    tolerance: Annotated[
        float,
        typer.Option(help="How far the rate that meets the SLO and that which breaks it may lie apart, relative."),
    ] = 0.02,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results.", show_default="results/capacity-BACKEND-POLICY-TRACE")
    ] = None,
    history: History = None,
    history_requests: HistoryRequests = 0,
    profile: Profile = None,
    model: Model = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    load_format: LoadFormat = "auto",
    tokenizer: Tokenizer = None,
    torch_threads: TorchThreads = None,
    tensor_parallel_size: TensorParallel = 1,
    pipeline_parallel_size: PipelineParallel = 1,
    stage_layers: StageLayers = None,
    url: Url = None,
    prompts: Prompts = "ids",
    vocab_size: VocabSize = None,
    max_concurrency: MaxConcurrency = None,
    drain_limit: DrainLimit = 600.0,
    warmup: Warmup = 0,
    endpoint: Endpoint = "completions",
    no_ignore_eos: NoIgnoreEos = False,
    extra_body: ExtraBody = None,
    set_: Settings = None,
) -> None:
    """Find the highest rate that meets an SLO and write capacity.csv and capacity.json.

    Rates are doubled from --low until the mean of the metric over the seeds exceeds the SLO; then the gap is halved
    until it is within the tolerance. The capacity is where the mean, linear between measured rates, crosses the SLO.

    The interval is of that crossing for seeds drawn with replacement (percentile bootstrap, 95 %): how far the capacity
    depends on which requests came. The exit status is 1 if no rate from --low to --high breaks the SLO, or if all do.
    """
    config = RunConfig(
        backend=backend,
        policy=policy,
        trace=trace,
        arrivals=arrivals,
        num_requests=num_requests,
        history=history,
        history_requests=history_requests,
        profile=profile,
        model=model,
        device=device,
        dtype=dtype,
        load_format=load_format,
        tokenizer=tokenizer,
        torch_threads=torch_threads,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        stage_layers=parse_stage_layers(stage_layers),
        url=url,
        prompts=prompts,
        vocab_size=vocab_size,
        max_concurrency=max_concurrency,
        drain_limit_s=drain_limit,
        warmup=warmup,
        endpoint=endpoint,
        ignore_eos=not no_ignore_eos,
        extra_body=parse_extra_body(extra_body),
        settings=parse_settings(set_ or []),
    )
    objective = Objective(slo, metric, parse_seeds(seeds), low, high, tolerance)
    folder = out or default_capacity_folder(config)
    result = find_capacity(config, objective, folder, lambda line: print(line, file=sys.stderr, flush=True))
    print("\n".join(result.describe()))
    print(f"wrote {folder}")
    if result.capacity.value is None:
        raise typer.Exit(1)


@app.command()
def policies() -> None:
    """List the scheduling policies and their options."""
    for name, policy in list_policies().items():
        description = (policy.__doc__ or "").strip().splitlines() or ["(its class has no docstring)"]
        print(f"{name:18} {description[0]}")
        try:
            defaults = policy.Options()
        except Exception as error:  # A user's, such as one without a default.
            print(f"{'':18} options: {', '.join(option_names(policy.Options))} (no defaults: {error})")
            continue
        options = [f"{option}={getattr(defaults, option)}" for option in option_names(policy.Options)]
        print(f"{'':18} options: {', '.join(options) or 'none'}")


@app.command()
def traces() -> None:
    """List the built-in request lengths and the kinds of files that can be read."""
    for name, description in list_traces():
        print(f"{name:24} {description}")


@app.command()
def profiles() -> None:
    """List the shipped latency profiles."""
    for name in list_profiles():
        profile = load_profile(name)
        print(f"{name:28} {profile.hardware}, {profile.engine}, KV cache {profile.kv_capacity_tokens} tokens")


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` as numbers."""
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise ConfigError(f"--seeds takes whole numbers with commas between, such as 0,1,2, not {text!r}") from None


def main() -> None:
    """Entry point."""
    run_app(app)


if __name__ == "__main__":
    main()

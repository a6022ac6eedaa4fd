"""The `fastbench` command: run a benchmark, or list what there is to run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastserve.console import run_app
from fastserve.errors import ConfigError
from fastserve.latency import list_profiles, load_profile
from fastserve.options import option_names
from fastserve.scheduler import list_policies
from harness.runner import RunConfig
from harness.runner import run as run_benchmark
from harness.traces import list_traces

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def fastbench() -> None:
    """Benchmark LLM serving schedulers, in simulation or on a real engine."""


@app.command()
def run(
    backend: Annotated[str, typer.Option(help="sim: virtual time from a profile; engine: a real model.")] = "sim",
    policy: Annotated[str, typer.Option(help="See `fastbench policies`, or package.module:Class.")] = "fastserve",
    trace: Annotated[str, typer.Option(help="Request lengths: see `fastbench traces`.")] = "sharegpt",
    arrivals: Annotated[str, typer.Option(help="poisson, gamma:cv=4, constant or trace.")] = "poisson",
    rate: Annotated[float | None, typer.Option(help="Requests per second; optional with trace arrivals.")] = None,
    num_requests: Annotated[int, typer.Option(help="Requests to serve.")] = 400,
    seed: Annotated[int, typer.Option(help="Same seed, same requests, for every policy.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results [default: results/BACKEND-POLICY-seedSEED]")
    ] = None,
    timeline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a trace of the run, to open in ui.perfetto.dev.")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="Latency profile: see `fastbench profiles`, or a .json.")] = None,
    model: Annotated[str | None, typer.Option(help="Model directory or preset (engine).")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda (engine).")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16 (engine).")] = "float32",
    load_format: Annotated[str, typer.Option(help="auto, or dummy for random weights (engine).")] = "auto",
    tokenizer: Annotated[str | None, typer.Option(help="Directory of a tokenizer, to count a trace's text.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Option of the engine or the policy.")
    ] = None,
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
        profile=profile,
        model=model,
        device=device,
        dtype=dtype,
        load_format=load_format,
        tokenizer=tokenizer,
        settings=parse_settings(set_ or []),
    )
    folder = out or Path("results") / f"{backend}-{policy.replace(':', '.')}-seed{seed}"
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
def policies() -> None:
    """List the scheduling policies and their options."""
    for name, policy in list_policies().items():
        print(f"{name:18} {(policy.__doc__ or '').strip().splitlines()[0]}")
        defaults = policy.Options()
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


def parse_settings(settings: list[str]) -> dict[str, str]:
    """`key=value` texts as a mapping."""
    parsed = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set takes key=value, got {setting!r}")
        parsed[key] = value
    return parsed


def main() -> None:
    """Entry point."""
    run_app(app)


if __name__ == "__main__":
    main()

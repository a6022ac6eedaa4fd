"""The `fastbench` command: run a benchmark, find a capacity, or list what there is to run."""

from __future__ import annotations

import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated

import typer

from fastserve.core.command import Taken, Version, new_app, with_options
from fastserve.core.compiled import docstring
from fastserve.core.console import run_app
from fastserve.core.errors import ConfigError
from fastserve.core.options import option_names
from fastserve.latency import MeasuredRange, list_profiles, load_profile
from fastserve.policies.discovery import list_policies
from harness.run.config import RunConfig
from harness.run.folders import default_capacity_folder, default_folder
from harness.run.profile_range import range_warning
from harness.run.runner import run as run_benchmark
from harness.workload.traces import list_traces

app = new_app()

_NUM_REQUESTS = (
    "Requests of every run, at every rate. Few requests are a burst: their queue drains after the last arrival, so "
    "they meet the SLO at a rate which the system does not sustain."
)


@app.callback()
def fastbench(version: Version = False) -> None:
    """Benchmark LLM serving schedulers, in simulation, on a real engine or on a server."""


@app.command()
@with_options
def run(
    config: RunConfig,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results.", show_default="results/BACKEND-POLICY-TRACE-RATE-seedSEED"),
    ] = None,
    timeline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a trace of the run, to open in ui.perfetto.dev.")
    ] = None,
) -> None:
    """Serve a workload and write requests.parquet, iterations.parquet, summary.json and meta.json."""
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
    if warning := range_warning([summary], config.profile):
        print(f"warning: {warning}", file=sys.stderr)


@app.command()
@with_options
def capacity(
    slo: Annotated[float, typer.Option(help="Bound on the metric, in its unit: s, or s/token.")],
    config: Annotated[RunConfig, Taken(without=("rate", "seed", "ranks"), help={"num_requests": _NUM_REQUESTS})],
    metric: Annotated[
        str, typer.Option(help="A latency of summary.json: mean_, p50_, p90_, p95_ or p99_ of a quantity.")
    ] = "mean_normalized_latency_s",
    seeds: Annotated[str, typer.Option(help="Sets of requests, with commas between; each is run at each rate.")] = (
        "0,1,2,3,4"
    ),
    low: Annotated[float, typer.Option(help="Lowest rate, in requests/s, from which rates are doubled.")] = 0.5,
    high: Annotated[float, typer.Option(help="Highest rate that is tried.")] = 1000.0,
    tolerance: Annotated[
        float, typer.Option(help="Stop when passing and failing rates differ by less than this fraction.")
    ] = 0.02,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results.", show_default="results/capacity-BACKEND-POLICY-TRACE")
    ] = None,
) -> None:
    """Find the highest rate that meets an SLO and write capacity.csv and capacity.json.

    Rates are doubled from --low until the mean of the metric over the seeds exceeds the SLO; then the gap is halved
    until it is within the tolerance. The capacity is where the mean, linear between measured rates, crosses the SLO.

    The interval (95 %) is a jackknife-t over the seeds. It says how far the capacity depends on the drawn requests. The
    exit status is 1 if no rate from --low to --high breaks the SLO, or if all do.
    """
    from harness.analysis.capacity_result import Objective  # Here, since a run needs neither.
    from harness.analysis.capacity_search import find_capacity

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
        description = docstring(policy).strip().splitlines() or ["(its class has no docstring)"]
        print(f"{name:18} {description[0]}")
        try:
            defaults = policy.Options()
        except Exception as error:  # A user's policy may have an option without a default.
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
    """List the shipped latency profiles: kind, cache and the range they were measured in, in tokens; source and error.

    A range is the largest iteration and prompt, the most decodes and the longest context; - where it is not known.
    """
    heads = ("cache", "iteration", "prompt", "decodes", "context")
    found = [load_profile(name) for name in list_profiles()]
    width = max(len(profile.name) for profile in found)
    print("  ".join([f"{'profile':{width}}  {'kind':16}", *(f"{head:>9}" for head in heads)]))
    for profile in found:
        bounds = asdict(profile.measured_range or MeasuredRange())
        counts = (profile.kv_capacity_tokens, *(bounds[field.name] for field in fields(MeasuredRange)))
        cells = (f"{'-' if count is None else format(count, ','):>9}" for count in counts)
        print("  ".join([f"{profile.name:{width}}  {profile.kind or '-':16}", *cells]))
        print(f"{'':4}{profile.hardware}, {profile.engine}; {profile.provenance.get('source', 'source not known')}")
        said = profile.known_error or profile.provenance.get("error") or profile.provenance.get("residuals_note")
        print(f"{'':4}error: {said or 'not known'}")


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parse `0,1,2` as numbers. ConfigError for any other text."""
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise ConfigError(f"--seeds takes whole numbers with commas between, such as 0,1,2, not {text!r}") from None


def main() -> None:
    """Run the command; the entry point."""
    run_app(app)


if __name__ == "__main__":
    main()

"""Everything to be measured on a machine with a GPU, in one session that can be broken off and taken up again.

The tests of the kernels, a latency profile of the model, the benchmarks, then the runs to be recorded. A step's log
takes its name when the step has succeeded: what has one is not done again, so delete a log to repeat its step. Only
PYTHONPATH is needed, not Snakemake; docs/cluster.md shows how.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastserve.errors import ConfigError, FastServeError
from fastserve.files import check_writable

ROOT = Path(__file__).resolve().parents[2]
NO_TESTS_COLLECTED = 5
"""Pytest's exit status."""


@dataclass(frozen=True)
class Step:
    """A command, with Python's arguments. One that exits with `nothing_to_do` is skipped, and tried again next time."""

    name: str
    arguments: tuple[str, ...]
    nothing_to_do: int | None = None


def steps(options: argparse.Namespace, out: Path) -> Iterator[Step]:
    """All steps in their order. The profile comes before the runs, whose policies take it."""
    model = ("--model", options.model, "--load-format", options.load_format, "--device", options.device)
    model += ("--dtype", options.dtype)
    profile = str(out / "profile.json")
    yield Step("kernel-tests", ("-m", "pytest", "-m", "gpu", "-q", "-rs", "tests/kernels"), NO_TESTS_COLLECTED)
    yield Step("profile", ("-m", "fastserve.cli", "profile", *model, "--out", profile))
    for benchmark in sorted((ROOT / "benchmarks").glob("gpu_*.py")):
        yield Step(f"benchmark-{benchmark.stem}", (str(benchmark), "--device", options.device))
    for rate in options.rates:
        for policy in options.policies:
            name = f"run-{policy}-rate-{rate:g}"
            workload = ("--trace", options.trace, "--rate", f"{rate:g}", "--num-requests", str(options.num_requests))
            run = ("run", "--backend", "engine", *model, "--profile", profile, "--policy", policy, *workload)
            yield Step(name, ("-m", "harness.cli", *run, "--out", str(out / "runs" / name)))


def carry_out(step: Step, logs: Path) -> str:
    """Run a step, its output to the user and to its log: NAME.log once it is done, NAME.unfinished.log till then.

    Returns what came of it: done, skipped or failed.
    """
    log = logs / f"{step.name}.unfinished.log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *step.arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            print(f"  {line}", end="", flush=True)
        status = process.wait()
    if status == 0:
        log.replace(logs / f"{step.name}.log")
        return "done"
    return "skipped, there is nothing to do yet" if status == step.nothing_to_do else f"failed with status {status}"


def device_name(device: str) -> str:
    """What the device calls itself, as a folder's name. Raises ConfigError where there is none."""
    try:
        import torch
    except ImportError:
        raise ConfigError(f"{sys.executable} has no torch; name a Python that has: make gpu PYTHON=...") from None
    if torch.device(device).type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ConfigError(
            f"--device {device}: torch {torch.__version__} sees no GPU here; run this on a machine that has one, or "
            "try it with --device cpu --dtype float32 --model opt-tiny --num-requests 4 --rates 4"
        )
    return "-".join(torch.cuda.get_device_name(device).lower().split())


def session(options: argparse.Namespace) -> int:
    """All steps that are not done. The first that fails ends it: what comes after rests on it. The exit status."""
    device = device_name(options.device)
    out = options.out or ROOT / "results" / "recorded" / device
    logs = out.resolve() / "logs"
    check_writable(logs / "kernel-tests.log")
    for step in steps(options, out.resolve()):
        if (logs / f"{step.name}.log").is_file():
            print(f"{step.name}: done before", flush=True)
            continue
        print(f"{step.name} ...", flush=True)
        began = time.monotonic()
        outcome = carry_out(step, logs)
        print(f"{step.name}: {outcome}, {time.monotonic() - began:.0f} s", flush=True)
        if outcome.startswith("failed"):
            print(f"error: see {logs / step.name}.unfinished.log; the same command goes on from here", file=sys.stderr)
            return 1
    print(f"all in {out}")
    return 0


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try this out (default: %(default)s)")
    parser.add_argument("--model", default="opt-13b", help="preset or folder (default: %(default)s)")
    parser.add_argument("--load-format", default="dummy", help="dummy, or auto for a folder (default: %(default)s)")
    parser.add_argument("--dtype", default="float16", help="(default: %(default)s)")
    parser.add_argument("--trace", default="sharegpt", help="request lengths (default: %(default)s)")
    parser.add_argument("--policies", nargs="+", default=["vllm", "fastserve-fcfs", "fastserve"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0, 2.0, 4.0, 8.0], help="requests per second")
    parser.add_argument("--num-requests", type=int, default=200, help="of each run (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder (default: results/recorded/ and the GPU's name)")
    try:
        sys.exit(session(parser.parse_args()))
    except FastServeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""The steps of a session on a machine with a GPU: what is run, in which order, and how long each may take."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from fastserve.core.errors import ConfigError
from harness.studies.recorded.design import Design, design_arguments

ROOT = Path(__file__).resolve().parents[1]
NO_TESTS_COLLECTED = 5
"""Pytest's exit status."""
MOST_TEST_PROCESSES = 8
"""Each takes some GiB of the GPU's memory."""
NO_GPU_TESTS = "tests/workflow"
"""Tests of the pipeline: some cannot even be collected without Snakemake and its libraries."""


@dataclass(frozen=True)
class Step:
    """A command, with Python's arguments."""

    name: str
    arguments: tuple[str, ...]
    needs_s: float
    """The step starts only if the call has this much time left."""
    limit_s: float
    """The step is killed after this time, and has then failed."""
    nothing_to_do: int | None = None
    """An exit status that means that there is nothing to do: the step is skipped, and tried again in the next call."""
    divisible: bool = False
    """Whether the step takes --minutes, does a part of its work in that time, and then exits with MORE_TO_DO."""
    repeated: bool = False
    """Whether every call carries out the step, as soon as there is a recorded run."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a step: done, unfinished, left, skipped, failed."""

    step: str
    what: str
    seconds: float = 0.0
    detail: str = ""


def steps(design: Design, out: Path, limits: Sequence[str] = ()) -> list[Step]:
    """List all steps in their order. The profile comes before the runs, whose policies use it.

    `limits` are STEP=SECONDS, where STEP may be a pattern; they replace the steps' own limits. Raises ConfigError.
    """
    folder = shown(out)
    machine = ("--device", design.device, "--model", design.model, "--dtype", design.dtype)
    tests = ("-m", "pytest", "-m", "gpu", "-q", "tests", f"--ignore={NO_GPU_TESTS}")
    if importlib.util.find_spec("xdist"):  # Compiling kernels takes most of the time, one core for each.
        tests += ("-n", str(min(MOST_TEST_PROCESSES, os.cpu_count() or 1)))
    found = [Step("kernel-tests", tests, 60, 300, nothing_to_do=NO_TESTS_COLLECTED)]
    for benchmark in sorted((ROOT / "benchmarks").glob("gpu_*.py")):
        name = benchmark.stem.removeprefix("gpu_")
        written = ("--out", f"{folder}/benchmarks/{name}.json")
        found.append(Step(f"benchmark-{name}", (f"benchmarks/{benchmark.name}", *machine, *written), 75, 300))
    profiled = ("--max-batch-size", str(max(design.max_batch_sizes)), "--out", f"{folder}/profile.json")
    profile = ("-m", "fastserve.cli", "profile", *machine, "--load-format", design.load_format, *profiled)
    found.append(Step("profile", profile, 90, 300))
    recording = ("-m", "harness.studies.recorded", "--out", folder, *design_arguments(design))
    found.append(Step("recorded", recording, 120, 7200, divisible=True))
    found.append(Step("simulations", ("-m", "harness.studies.agreement", folder), 30, 300, repeated=True))
    for limit in limits:
        pattern, _, seconds = limit.rpartition("=")
        chosen = matching([step.name for step in found], [pattern])
        with contextlib.suppress(ValueError):
            if float(seconds) > 0:
                found = [_limited(step, float(seconds)) if step.name in chosen else step for step in found]
                continue
        raise ConfigError(f"--limit takes STEP=SECONDS, such as profile=200, got {limit!r}")
    return found


def _limited(step: Step, limit_s: float) -> Step:
    changes = {"limit_s": limit_s, "needs_s": min(step.needs_s, limit_s)}
    return Step(**{field.name: getattr(step, field.name) for field in fields(Step)} | changes)


def matching(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The names that match any pattern. Raises ConfigError for a pattern that matches no name."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"there is no step {pattern!r}; there are: {', '.join(names)}")
    return {name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}


def shown(path: Path) -> str:
    """The path relative to the project if it lies in it, so that records name no folder of this machine."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)

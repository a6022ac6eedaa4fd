"""Everything to be measured on a machine with a GPU, in one call or in several that go on where the last one ended.

Tests of the kernels, benchmarks (benchmarks/gpu_*.py), a latency profile of the model, the recorded runs
(harness.studies.recorded), and simulations of them (harness.studies.agreement). All of it goes to one folder, with the
log of every step; meta.json there has a record of each call. A step's log takes its name when the step has succeeded:
what has one is not done again, so delete a log to repeat its step. Needs PYTHONPATH, and no Snakemake: docs/cluster.md
shows how.

The exit status is 0 when all steps chosen are done, 1 when one failed, 2 for bad input, 3 when time ran out.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastserve.core.console import Terminated, raise_on_signals
from fastserve.core.errors import ConfigError, FastServeError
from fastserve.core.files import atomic_write, check_writable
from fastserve.core.processes import Leash
from harness.analysis.points import read_json, write_json
from harness.run.meta import COMMIT_VARIABLE
from harness.studies.recorded.design import Design, add_design_options, design_arguments, design_of
from harness.studies.recorded.recording import MORE_TO_DO

ROOT = Path(__file__).resolve().parents[1]
FAILED, BAD_INPUT = 1, 2
NO_TESTS_COLLECTED = 5
"""Pytest's exit status."""
DRY_RUN: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "model": "opt-tiny",
    "max_batch_sizes": (2, 4),
    "traces": ("alpaca",),
    "memories": ("tokens:512", "all"),
    "loads": (2.0,),
    "seconds": 0.3,
    "fewest_requests": 12,
    "gpu_gib": 0.05,
    "host_gib": 0.05,
}
"""Options with which everything runs on a CPU in a minute or two, to see that it does."""
MOST_TEST_PROCESSES = 8
"""Each has some GiB of the GPU's memory."""
NO_GPU_TESTS = "tests/workflow"
"""Tests of the pipeline: some cannot even be collected without Snakemake and its libraries."""
_FOR_THE_END_S = 10.0
"""Kept of a call's time for what comes after its last step, such as packing."""
_TO_STOP_S = 5.0
"""A step that is killed may end so much later."""
_TO_START_S = 15.0
"""Kept of a divisible step's time for starting Python and stopping."""
_MOST_OF_A_LOG = 100_000
"""Characters kept of a log's beginning, and of its end."""


@dataclass(frozen=True)
class Step:
    """A command, with Python's arguments."""

    name: str
    arguments: tuple[str, ...]
    needs_s: float
    """With less of the call's time left it is not begun."""
    limit_s: float
    """It is killed after so long, and has failed."""
    nothing_to_do: int | None = None
    """An exit status that means so; it is skipped then, and tried again next time."""
    divisible: bool = False
    """It takes --minutes, does what it can in them, and exits with MORE_TO_DO where that is not all."""
    repeated: bool = False
    """It is carried out in each call, whatever is still missing, if there is a recorded run."""


@dataclass(frozen=True)
class Outcome:
    """What came of a step: done, unfinished, left, skipped, failed."""

    step: str
    what: str
    seconds: float = 0.0
    detail: str = ""


def steps(design: Design, out: Path, limits: Sequence[str] = ()) -> list[Step]:
    """All steps in their order. The profile comes before the runs, whose policies take it.

    `limits` are STEP=SECONDS, where STEP may be a pattern, and replace the steps' own.
    """
    folder = _shown(out)
    machine = ("--device", design.device, "--model", design.model, "--dtype", design.dtype)
    tests = ("-m", "pytest", "-m", "gpu", "-q", "tests", f"--ignore={NO_GPU_TESTS}")
    if importlib.util.find_spec("xdist"):  # Most of their time is compiling kernels, on one core each.
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
        chosen = _matching([step.name for step in found], [pattern])
        with contextlib.suppress(ValueError):
            if float(seconds) > 0:
                found = [_limited(step, float(seconds)) if step.name in chosen else step for step in found]
                continue
        raise ConfigError(f"--limit takes STEP=SECONDS, such as profile=200, got {limit!r}")
    return found


def _limited(step: Step, limit_s: float) -> Step:
    changes = {"limit_s": limit_s, "needs_s": min(step.needs_s, limit_s)}
    return Step(**{field.name: getattr(step, field.name) for field in fields(Step)} | changes)


def _matching(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The names that match any pattern. Raises ConfigError for a pattern that none matches."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"there is no step {pattern!r}; there are: {', '.join(names)}")
    return {name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}


def _shown(path: Path) -> str:
    """Relative to the project where it lies below, so that what is recorded names no folder of this machine."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


# -- a step ----------------------------------------------------------------------------------------------------------


def carry_out(step: Step, logs: Path, left_s: float) -> Outcome:
    """Run a step, its output to the user and to its log: NAME.log once it is done, NAME.unfinished.log till then.

    It and all it has started are killed after its limit, or when `left_s` seconds have passed, if that comes first.
    """
    arguments, limit_s = list(step.arguments), min(step.limit_s, left_s)
    if step.divisible and math.isfinite(left_s):
        arguments += ["--minutes", f"{(limit_s - _TO_START_S) / 60:.3f}"]
    log, began = logs / f"{step.name}.unfinished.log", time.monotonic()
    with log.open("w", encoding="utf-8") as file, _started(arguments, limit_s) as (process, expired):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            print(f"  {line}", end="", flush=True)
        status = process.wait()
        if expired.is_set():
            file.write(f"killed after {limit_s:.3g} s\n")
    seconds = time.monotonic() - began
    _shorten(log)
    if expired.is_set():
        return Outcome(step.name, "failed", seconds, f"took longer than {limit_s:.3g} s and was killed")
    if status == 0:
        log.replace(logs / f"{step.name}.log")
        return Outcome(step.name, "done", seconds)
    if status == step.nothing_to_do:
        return Outcome(step.name, "skipped", seconds, "there is nothing to do yet")
    if step.divisible and status == MORE_TO_DO:
        return Outcome(step.name, "unfinished", seconds, "the next call goes on with it")
    return Outcome(step.name, "failed", seconds, f"status {status}")


@contextlib.contextmanager
def _started(arguments: Sequence[str], limit_s: float) -> Iterator[tuple[subprocess.Popen[str], threading.Event]]:
    """A process in a group of its own, which is killed after the limit, when the event is set, or with us."""
    leash = Leash()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    leash.hold(process.pid)
    expired = threading.Event()

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def expire() -> None:
        expired.set()
        kill()

    timer = threading.Timer(min(limit_s, threading.TIMEOUT_MAX), expire)
    timer.start()
    try:
        yield process, expired
    finally:
        timer.cancel()
        kill()
        process.wait()
        leash.close()


def _shorten(log: Path) -> None:
    """Leave out the middle of a long log."""
    text = log.read_text(encoding="utf-8")
    if len(text) > 2 * _MOST_OF_A_LOG:
        left_out = len(text) - 2 * _MOST_OF_A_LOG
        text = f"{text[:_MOST_OF_A_LOG]}\n... {left_out} characters left out ...\n{text[-_MOST_OF_A_LOG:]}"
        log.write_text(text, encoding="utf-8")


# -- a call ----------------------------------------------------------------------------------------------------------


def call(chosen: Sequence[Step], out: Path, deadline: float, keep_going: bool, note: CallNote) -> int:
    """Carry out the steps that are not done, till `deadline` (of time.monotonic). The exit status.

    A step with too little time left waits for the next call, and so do those after it, which may rest on it. The first
    that fails ends the call unless told to keep going.
    """
    logs = out / "logs"
    has_failed = has_left = False
    for i, step in enumerate(chosen):
        later_s = sum(later.needs_s + _TO_STOP_S for later in chosen[i + 1 :] if later.repeated)
        reserved = _FOR_THE_END_S + later_s
        left_s = deadline - time.monotonic() - reserved
        if step.repeated and not any(out.glob("runs/*/summary.json")):
            outcome = Outcome(step.name, "left", detail="no run is recorded yet")
        elif not step.repeated and (logs / f"{step.name}.log").is_file():
            outcome = Outcome(step.name, "done before")
        elif (has_left and not step.repeated) or left_s < step.needs_s:
            outcome = Outcome(step.name, "left", detail="too little time, for the next call")
        else:
            print(f"{step.name} ...", flush=True)
            try:
                outcome = carry_out(step, logs, left_s)
            except BaseException:
                note.add(Outcome(step.name, "broken off"))
                raise
        note.add(outcome)
        print(f"{step.name}: {_told(outcome)}", flush=True)
        has_left |= outcome.what in ("left", "unfinished")
        if outcome.what == "failed":
            has_failed = True
            print(f"error: see {_shown(logs / step.name)}.unfinished.log; the same command goes on from here")
            if not keep_going:
                break
    return FAILED if has_failed else MORE_TO_DO if has_left else 0


def _told(outcome: Outcome) -> str:
    seconds = f", {outcome.seconds:.0f} s" if outcome.seconds else ""
    return f"{outcome.what}{seconds}" + (f": {outcome.detail}" if outcome.detail else "")


class CallNote:
    """The record of a call in meta.json, written anew after every step."""

    def __init__(self, out: Path, machine: dict[str, Any], options: dict[str, Any]) -> None:
        self._path = out / "meta.json"
        self._calls: list[Any] = read_json(self._path)["calls"] if self._path.exists() else []
        self.outcomes: list[Outcome] = []
        self._began = time.monotonic()
        self._own = {"began": datetime.now(UTC).isoformat(timespec="seconds"), **machine, "options": options}
        self._write()

    def add(self, outcome: Outcome) -> None:
        """One step more."""
        self.outcomes.append(outcome)
        self._write()

    def _write(self) -> None:
        steps = {o.step: {"outcome": _told(o), "seconds": round(o.seconds, 1)} for o in self.outcomes}
        seconds = round(time.monotonic() - self._began, 1)
        write_json({"calls": [*self._calls, self._own | {"steps": steps, "seconds": seconds}]}, self._path)


_ASK_THE_MACHINE = """
import json, sys
try:
    import torch
except ImportError:
    sys.exit("no torch")
from harness.run.meta import environment_meta
device = torch.device(sys.argv[1])
found = {"torch": torch.__version__, "device": device.type, **environment_meta()}
if device.type == "cuda":
    found["device"] = torch.cuda.get_device_name(device) if torch.cuda.is_available() else None
print(json.dumps(found))
"""


def machine_of(device: str) -> dict[str, Any]:
    """Commit, versions, hardware, what the device calls itself, and what nvidia-smi says of it.

    Asked in a process of its own: one that has used a GPU keeps memory on it. Raises ConfigError where there is none.
    """
    asked = subprocess.run(
        [sys.executable, "-c", _ASK_THE_MACHINE, device], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if "no torch" in asked.stderr:
        raise ConfigError(f"{sys.executable} has no torch; name a Python that has: make gpu PYTHON=...")
    if asked.returncode:
        raise ConfigError(f"cannot ask torch for --device {device}: {asked.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    if found["device"] is None:
        raise ConfigError(
            f"--device {device}: torch {found['torch']} sees no GPU here; run this on a machine that has one, or try "
            "it on the CPU with --dry-run"
        )
    if found["device"] != "cpu":
        query = "name,driver_version,memory.total,power.limit,clocks.max.sm,pcie.link.gen.max,pcie.link.width.max"
        with contextlib.suppress(OSError):
            told = subprocess.run(
                ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
            found["nvidia_smi"] = dict(zip(query.split(","), told.stdout.strip().split(", "), strict=False))
    return found


def pack(out: Path, archive: Path) -> None:
    """The whole folder as a .tar.gz, which unpacks to its place in the project."""
    within = _shown(out) if out.is_relative_to(ROOT) else out.name

    def kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        is_archive = entry.name.endswith(archive.name)
        return None if is_archive or Path(entry.name).name.startswith(".") else entry

    with atomic_write(archive) as staging, tarfile.open(staging, "w:gz") as tar:
        tar.add(out, arcname=within, filter=kept)
    print(f"packed {archive}: {archive.stat().st_size / 2**20:.1f} MiB")


def session(options: argparse.Namespace) -> int:
    """One call. The exit status."""
    began, design = time.monotonic(), design_of(options)
    if options.dry_run:  # Or torch's threads and whatever else runs here wait for each other.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.commit:
        os.environ[COMMIT_VARIABLE] = options.commit
    if options.list:
        for step in _chosen(options, design, options.out or ROOT / "results/recorded/GPU"):
            print(f"{step.name:24} needs {step.needs_s:4.0f} s, is killed after {step.limit_s:5.0f} s")
        return 0
    machine = machine_of(design.device)
    out = options.out or _default_folder(machine["device"])
    out = out.resolve()
    chosen = _chosen(options, design, out)
    if options.dry_run and options.out is None:
        shutil.rmtree(out, ignore_errors=True)
    for name in ("logs", "benchmarks", "runs"):
        check_writable(out / name / "x")
    if options.pack:
        check_writable(options.pack)
    note = CallNote(out, machine, {**vars(options), "out": _shown(out), "pack": options.pack and options.pack.name})
    deadline = math.inf if options.minutes is None else began + 60 * options.minutes
    try:
        status = call(chosen, out, deadline, options.keep_going, note)
    finally:
        print(f"\n{'step':24} outcome")
        for outcome in note.outcomes:
            print(f"{outcome.step:24} {_told(outcome)}")
        print(f"{time.monotonic() - began:.0f} s; all in {_shown(out)}", flush=True)
        if options.pack:
            pack(out, options.pack.resolve())
    return status


def _chosen(options: argparse.Namespace, design: Design, out: Path) -> list[Step]:
    every = steps(design, out, options.limit)
    names = _matching([step.name for step in every], options.steps or ["*"])
    return [step for step in every if step.name in names]


def _default_folder(device: str) -> Path:
    """What a CPU says is no result: it goes where git does not look."""
    if device == "cpu":
        return ROOT / "results/dry-run"
    return ROOT / "results/recorded" / "-".join(device.lower().split())


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="these only; * stands for anything (default: all)")
    parser.add_argument("--minutes", type=float, help="of the whole call; what does not fit is left for the next")
    parser.add_argument("--limit", nargs="+", default=[], metavar="STEP=SECONDS", help="kill a step after another time")
    parser.add_argument("--keep-going", action="store_true", help="go on after a step that failed")
    parser.add_argument("--list", action="store_true", help="list the steps and their times, and do nothing")
    parser.add_argument("--dry-run", action="store_true", help="on this CPU, a tiny model, to see that all of it works")
    parser.add_argument("--out", type=Path, help="folder (default: results/recorded/ and the GPU's name)")
    parser.add_argument(
        "--pack", type=Path, metavar="FILE.tar.gz", help="write the folder there at the end of the call"
    )
    parser.add_argument("--commit", help="of this code, where it is a copy without its checkout")
    add_design_options(parser.add_argument_group("what is measured and recorded"))
    if "--dry-run" in sys.argv:
        parser.set_defaults(**DRY_RUN)
    # A caller that runs out of time ends us by SIGTERM: our processes are then killed and the folder is packed.
    raise_on_signals()
    try:
        sys.exit(session(parser.parse_args()))
    except FastServeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt as error:
        sys.exit(128 + (error.signum if isinstance(error, Terminated) else signal.SIGINT))


if __name__ == "__main__":
    main()

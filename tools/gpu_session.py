"""Measure everything on a machine with a GPU: in one call, or in several that each resume where the last one ended.

The steps: tests of the kernels, benchmarks (benchmarks/gpu_*.py), a latency profile of the model, the recorded runs
(harness.studies.recorded), and their simulations (harness.studies.agreement). All files go to one folder, with a log of
every step; its meta.json has a record of each call. A step that succeeds leaves its log as NAME.log and is not
repeated; delete the log to repeat the step. Needs PYTHONPATH, and no Snakemake: docs/cluster.md shows how.

The exit status is 0 when all chosen steps are done, 1 when one failed, 2 for bad input, 3 when time ran out.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _gpu_machine import machine_of
from _gpu_processes import carry_out
from _gpu_steps import ROOT, Outcome, Step, matching, shown, steps

from fastserve.core.console import Terminated, raise_on_signals
from fastserve.core.errors import FastServeError
from fastserve.core.files import atomic_write, check_writable
from harness.analysis.files import read_json, write_json
from harness.run.meta import COMMIT_VARIABLE
from harness.studies.recorded.design import Design, add_design_options, design_of
from harness.studies.recorded.recording import MORE_TO_DO

FAILED, BAD_INPUT = 1, 2
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
"""Options with which all steps run on a CPU in a minute or two, as a trial."""
_FOR_THE_END_S = 10.0
"""Part of a call's time that is kept for what follows its last step, such as packing."""
_TO_STOP_S = 5.0
"""Time that a killed step may take to end."""


def call(chosen: Sequence[Step], out: Path, deadline: float, keep_going: bool, note: CallNote) -> int:
    """Carry out the steps that are not done, until `deadline` (of time.monotonic). Return the exit status.

    A step with too little time left waits for the next call, and so do all steps after it, which may depend on it. The
    first step that fails ends the call, unless `keep_going`.
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
            outcome = Outcome(step.name, "left", detail="too little time; the next call does it")
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
            print(f"error: see {shown(logs / step.name)}.unfinished.log; the same command resumes here")
            if not keep_going:
                break
    return FAILED if has_failed else MORE_TO_DO if has_left else 0


def _told(outcome: Outcome) -> str:
    seconds = f", {outcome.seconds:.0f} s" if outcome.seconds else ""
    return f"{outcome.what}{seconds}" + (f": {outcome.detail}" if outcome.detail else "")


class CallNote:
    """The record of a call in meta.json, rewritten after every step."""

    def __init__(self, out: Path, machine: dict[str, Any], options: dict[str, Any]) -> None:
        self._path = out / "meta.json"
        self._calls: list[Any] = read_json(self._path)["calls"] if self._path.exists() else []
        self.outcomes: list[Outcome] = []
        self._began = time.monotonic()
        self._own = {"began": datetime.now(UTC).isoformat(timespec="seconds"), **machine, "options": options}
        self._write()

    def add(self, outcome: Outcome) -> None:
        """Add the outcome of a step."""
        self.outcomes.append(outcome)
        self._write()

    def _write(self) -> None:
        steps = {o.step: {"outcome": _told(o), "seconds": round(o.seconds, 1)} for o in self.outcomes}
        seconds = round(time.monotonic() - self._began, 1)
        write_json({"calls": [*self._calls, self._own | {"steps": steps, "seconds": seconds}]}, self._path)


def pack(out: Path, archive: Path) -> None:
    """Pack the whole folder as a .tar.gz, which unpacks to its place in the project."""
    within = shown(out) if out.is_relative_to(ROOT) else out.name

    def kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        is_archive = entry.name.endswith(archive.name)
        return None if is_archive or Path(entry.name).name.startswith(".") else entry

    with atomic_write(archive) as staging, tarfile.open(staging, "w:gz") as tar:
        tar.add(out, arcname=within, filter=kept)
    print(f"packed {archive}: {archive.stat().st_size / 2**20:.1f} MiB")


def session(options: argparse.Namespace) -> int:
    """Carry out one call. Return the exit status."""
    began, design = time.monotonic(), design_of(options)
    if options.dry_run:  # Otherwise torch's threads compete with the other processes of this machine.
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
    note = CallNote(out, machine, {**vars(options), "out": shown(out), "pack": options.pack and options.pack.name})
    deadline = math.inf if options.minutes is None else began + 60 * options.minutes
    try:
        status = call(chosen, out, deadline, options.keep_going, note)
    finally:
        print(f"\n{'step':24} outcome")
        for outcome in note.outcomes:
            print(f"{outcome.step:24} {_told(outcome)}")
        print(f"{time.monotonic() - began:.0f} s; all in {shown(out)}", flush=True)
        if options.pack:
            pack(out, options.pack.resolve())
    return status


def _chosen(options: argparse.Namespace, design: Design, out: Path) -> list[Step]:
    every = steps(design, out, options.limit)
    names = matching([step.name for step in every], options.steps or ["*"])
    return [step for step in every if step.name in names]


def _default_folder(device: str) -> Path:
    """The folder for the device. Measurements of a CPU are no results: they go to a folder that git ignores."""
    if device == "cpu":
        return ROOT / "results/dry-run"
    return ROOT / "results/recorded" / "-".join(device.lower().split())


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="only these steps; * is any text (default: all)")
    parser.add_argument("--minutes", type=float, help="length of the whole call; the next call does what does not fit")
    parser.add_argument("--limit", nargs="+", default=[], metavar="STEP=SECONDS", help="replace a step's time limit")
    parser.add_argument("--keep-going", action="store_true", help="continue after a failed step")
    parser.add_argument("--list", action="store_true", help="list the steps and their times, and run none")
    parser.add_argument("--dry-run", action="store_true", help="try all steps on this CPU with a tiny model")
    parser.add_argument("--out", type=Path, help="folder (default: results/recorded/ and the GPU's name)")
    parser.add_argument(
        "--pack", type=Path, metavar="FILE.tar.gz", help="pack the folder into this file at the end of the call"
    )
    parser.add_argument("--commit", help="commit of this code, if it is a copy without its checkout")
    add_design_options(parser.add_argument_group("what is measured and recorded"))
    if "--dry-run" in sys.argv:
        parser.set_defaults(**DRY_RUN)
    # A caller that runs out of time sends SIGTERM: the processes of the session are then killed, the folder is packed.
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

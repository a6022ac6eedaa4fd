"""The recording: make the runs of a plan that are still missing, one after the other on one worker."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastserve.engine import FinishedTransfer, Observer
from harness.run.runner import run
from harness.studies.recorded.design import Design
from harness.studies.recorded.plan import Plan, RecordedRun, plan_of
from harness.studies.simulations import simulated
from harness.workload.arrivals import AT_ONCE

if TYPE_CHECKING:
    from fastserve.runtime.worker import Worker

MORE_TO_DO = 3
"""Exit status of the command if time ran out before all runs were recorded."""
_LONGER_THAN_SIMULATED, _AROUND_A_RUN_S = 1.15, 3.0
"""Time allowed for a run: this multiple of its simulated duration, and seconds for what comes before and after."""


def record(design: Design, recorded: Path, minutes: float | None = None) -> bool:
    """Make the runs of the design that `recorded` lacks; return whether all are there now.

    `recorded`/profile.json, which `fastserve profile` writes, gives the policies their iteration times. With `minutes`,
    a run starts only if its simulated duration says that it ends in time.

    Raises ConfigError if the folder's plan is of another design or profile, or the design does not fit the machine.
    """
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    plan = plan_of(design, recorded)
    missing = [each for each in plan.runs if not each.is_there(recorded)]
    print(f"{len(plan.runs) - len(missing)} of {len(plan.runs)} runs are recorded", flush=True)
    worker: Worker | None = None
    for each in missing:
        expected_s = _simulated_duration(each, recorded)
        allowed_s = _LONGER_THAN_SIMULATED * expected_s + _AROUND_A_RUN_S
        left_s = deadline - time.monotonic()
        if allowed_s > left_s:
            print(f"{left_s:.0f} s are left and {each.name} takes about {expected_s:.0f} s; the next call resumes here")
            return False
        if worker is None:
            worker = _make_worker(plan)
            _warm_up(plan, worker)
            if time.monotonic() + allowed_s > deadline:
                print("no time is left after loading and warming up: give more minutes")
                return False
        gc.collect()
        gc.freeze()  # No collection visits the objects made so far in the middle of a run.
        summary = _make_run(plan, each, recorded, worker)
        print(
            f"{each.name}, {each.config.num_requests} requests at {each.config.rate:g}/s: "
            f"{summary['mean_normalized_latency_s']:.4f} s/token, {summary['duration_s']:.1f} s "
            f"(simulated {expected_s:.1f})",
            flush=True,
        )
    return True


def _simulated_duration(each: RecordedRun, recorded: Path) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        return float(run(simulated(each.config, recorded / "profile.json"), Path(scratch))["duration_s"])


def _make_worker(plan: Plan) -> Worker:
    from fastserve.runtime.models.source import resolve_model  # Imports torch.
    from fastserve.runtime.worker import Worker

    design = plan.design
    model, directory = resolve_model(design.model, design.load_format)
    return Worker(
        model,
        num_gpu_blocks=plan.cache.num_gpu_blocks,
        num_host_blocks=plan.cache.num_host_blocks,
        block_size=plan.cache.block_size,
        device=design.device,
        dtype=design.dtype,
        seed=design.seed,
        model_dir=directory,
        max_batch_size=max(design.max_batch_sizes),
        max_model_len=model.max_model_len,
    )


def _warm_up(plan: Plan, worker: Worker) -> None:
    """Run two full batches of each trace at once, in the smallest cache and the largest batch.

    These have prompts of many lengths, decodes of all batch sizes, and copies both ways.
    """
    size = max(plan.design.max_batch_sizes)
    blocks = min(each.config.settings["num_gpu_blocks"] for each in plan.runs)
    for trace in plan.design.traces:
        like = next(each.config for each in plan.runs if each.config.trace == trace)
        settings = {**like.settings, "max_batch_size": size, "num_gpu_blocks": blocks}
        config = replace(like, policy="fastserve", rate=AT_ONCE, num_requests=2 * size, settings=settings)
        with tempfile.TemporaryDirectory() as scratch:
            run(config, Path(scratch), worker=worker)


def _make_run(plan: Plan, each: RecordedRun, recorded: Path, worker: Worker) -> dict[str, Any]:
    """Make a run in a staging folder, which is renamed when all files are in it."""
    folder = each.folder(recorded)
    staging = folder.with_name(f".{each.name}")
    shutil.rmtree(staging, ignore_errors=True)
    transfers = _Transfers()
    summary = run(each.config, staging, observer=transfers, worker=worker)
    pq.write_table(transfers.table(), staging / "transfers.parquet")
    meta = json.loads((staging / "meta.json").read_text(encoding="utf-8"))
    meta["recorded"] = {
        "memory": each.memory,
        "load": each.load,
        "pools": asdict(plan.cache),
        "profile_sha256": plan.profile_sha256,
    }
    (staging / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    os.replace(staging, folder)
    return summary


class _Transfers(Observer):
    """Records the start and end of each transfer, in seconds on the engine's clock."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, int, float, float]] = []

    def on_transfer(self, finished: FinishedTransfer) -> None:
        transfer = finished.transfer
        self._rows.append((transfer.direction.value, transfer.num_bytes, finished.start_s, finished.end_s))

    def table(self) -> pa.Table:
        """A row per transfer."""
        columns = zip(*self._rows, strict=True) if self._rows else ((), (), (), ())
        types = {"direction": pa.string(), "num_bytes": pa.int64(), "start_s": pa.float64(), "end_s": pa.float64()}
        return pa.table(
            {name: pa.array(column, type_) for (name, type_), column in zip(types.items(), columns, strict=True)}
        )

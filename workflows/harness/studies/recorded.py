"""The recorded experiments: many short runs of the real engine by one worker on this machine's GPU, kept as a folder.

FOLDER/plan.json says what is run, in its order, and FOLDER/runs/NAME holds a run: its four files and transfers.parquet.
The rates of the plan are shares of the rate at which the simulator, with the profile measured on this machine, serves
requests. A run is there or not, so recording can be broken off at any time and taken up again; it goes on with the
plan's sizes of the cache. `harness.studies.agreement` compares the runs with simulations of them.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastserve.core.checks import require_int, require_positive
from fastserve.core.config import CacheConfig, EngineOptions, ModelConfig, dtype_bytes
from fastserve.core.errors import ConfigError, FastServeError
from fastserve.core.files import check_writable
from fastserve.engine import FinishedTransfer, Observer
from fastserve.latency import load_profile
from fastserve.policies.settings import resolve_settings
from harness.analysis.points import write_json
from harness.run.config import RunConfig
from harness.run.runner import run
from harness.studies.fidelity import AT_ONCE, service_rate, simulated

if TYPE_CHECKING:
    from fastserve.runtime.worker import Worker

MORE_TO_DO = 3
"""Exit status where time ran out before all runs were made."""
BASELINE = "fastserve-fcfs"
"""The policy whose service rate is the load of 1."""
_REQUESTS_AT_ONCE = 400
_DEVICE_SHARE = {"cpu": 0.1, "cuda": 0.85}
"""Of the device's memory that is free beside the weights, what the pool of "all" takes: the rest is for computing."""
_HOST_SHARE = 0.5
_LONGER_THAN_SIMULATED, _AROUND_A_RUN_S = 1.15, 3.0
"""How long a run may take: so many times its simulated duration, and so many seconds for what is around it."""


@dataclass(frozen=True)
class Design:
    """What is to be recorded: every policy at every load in every setting (batch size, trace, memory)."""

    model: str = "opt-13b"
    load_format: str = "dummy"
    device: str = "cuda"
    dtype: str = "float16"
    max_batch_sizes: tuple[int, ...] = (16, 64)
    traces: tuple[str, ...] = ("sharegpt-filtered", "alpaca")
    memories: tuple[str, ...] = ("a100-40g", "all")
    """Of the KV cache: "all" that the device has, "tokens:N", or what a shipped profile has, as a100-40g/MODEL-tp1."""
    loads: tuple[float, ...] = (1.3, 2.0, 0.8)
    """Shares of the service rate. Well above 1, or so short a burst does not fill even the cache of an A100-40GB."""
    policies: tuple[str, ...] = ("fastserve", "fastserve-fcfs", "vllm")
    seconds: float = 6.0
    """How long requests arrive."""
    fewest_requests: int = 40
    seed: int = 0
    gpu_gib: float | None = None
    """Most of the device's memory the cache takes; None leaves it `_DEVICE_SHARE` of what is free."""
    host_gib: float | None = None
    """Host memory for swapped caches; None takes half of what is free."""

    def __post_init__(self) -> None:
        for name in ("max_batch_sizes", "traces", "memories", "loads", "policies"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name}: give at least one, each once, not {list(values)}")
        for size in self.max_batch_sizes:
            require_int("max_batch_sizes", size, 1)
        for load in self.loads:
            require_positive("loads", load)
        require_positive("seconds", self.seconds)
        require_int("fewest_requests", self.fewest_requests, 1)
        for name in ("gpu_gib", "host_gib"):
            if (value := getattr(self, name)) is not None:
                require_positive(name, value)


def _design_from(values: Mapping[str, Any]) -> Design:
    """From what JSON and the command line have lists for."""
    fields: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in values.items()}
    return Design(**fields)


@dataclass(frozen=True)
class RecordedRun:
    """One run and its place among the others."""

    name: str
    memory: str
    load: float
    config: RunConfig

    def folder(self, recorded: Path) -> Path:
        """Where its files are."""
        return recorded / "runs" / self.name

    def is_there(self, recorded: Path) -> bool:
        """Whether it has been made."""
        return (self.folder(recorded) / "summary.json").is_file()


@dataclass(frozen=True)
class Plan:
    """The runs in their order, and what they rest on."""

    design: Design
    cache: CacheConfig
    """The worker's pools."""
    profile_sha256: str
    runs: tuple[RecordedRun, ...]

    def save(self, path: Path) -> None:
        """Write it as JSON, whole."""
        write_json(asdict(self), path)


def read_plan(recorded: Path) -> Plan:
    """The plan of a folder. Raises ConfigError if there is none or it is not one."""
    path = recorded / "plan.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        own_profile = {"profile": str(recorded / "profile.json")}  # Wherever the folder is now.
        runs = (RecordedRun(**{**each, "config": RunConfig(**each["config"] | own_profile)}) for each in data["runs"])
        return Plan(_design_from(data["design"]), CacheConfig(**data["cache"]), data["profile_sha256"], tuple(runs))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot read the plan {path}: {error}; give a folder that recording has written") from error


def make_plan(design: Design, profile: Path) -> Plan:
    """Sizes of the pools on this machine, rates from simulations with `profile`, and every run.

    The order is that of the design, the first batch size and trace first, and within a load all policies one after the
    other: recording that is broken off leaves complete comparisons. Raises ConfigError for what does not fit.
    """
    from fastserve.runtime.models.source import resolve_model

    model, _ = resolve_model(design.model, design.load_format)
    cache = _pools(design, model)
    runs: list[RecordedRun] = []
    with tempfile.TemporaryDirectory() as scratch:
        for size in design.max_batch_sizes:
            for trace in design.traces:
                for memory in design.memories:
                    base = RunConfig(
                        backend="engine",
                        policy=BASELINE,
                        trace=trace,
                        seed=design.seed,
                        profile=str(profile),
                        model=design.model,
                        device=design.device,
                        dtype=design.dtype,
                        load_format=design.load_format,
                        settings={
                            "max_batch_size": size,
                            "block_size": cache.block_size,
                            "num_gpu_blocks": _num_gpu_blocks(memory, design, cache),
                            "num_host_blocks": cache.num_host_blocks,
                            "max_model_len": model.max_model_len,
                        },
                    )
                    served = service_rate(simulated(base, profile), _REQUESTS_AT_ONCE, Path(scratch))
                    runs += _runs_of_setting(design, base, memory, served)
    return Plan(design, cache, _sha256(profile), tuple(runs))


def _runs_of_setting(design: Design, base: RunConfig, memory: str, served: float) -> Iterator[RecordedRun]:
    for load in design.loads:
        rate = float(f"{load * served:.3g}")
        num_requests = max(design.fewest_requests, math.ceil(rate * design.seconds))
        for policy in design.policies:
            resolve_settings(policy, base.settings)
            parts = (base.trace, f"batch-{base.settings['max_batch_size']}", memory, f"load-{load:g}", policy)
            name = "-".join("".join(c if c.isalnum() or c in "-." else "-" for c in part) for part in parts)
            yield RecordedRun(name, memory, load, replace(base, policy=policy, rate=rate, num_requests=num_requests))


def _pools(design: Design, model: ModelConfig) -> CacheConfig:
    """What this machine's memory holds, within the design's bounds."""
    import torch

    from fastserve.runtime.worker.memory import available_bytes

    block_size = EngineOptions().block_size
    bytes_per_token = model.kv_bytes_per_token(design.dtype)
    device = torch.device(design.device)
    free = available_bytes(device) - model.num_parameters() * dtype_bytes(design.dtype)
    room = [_DEVICE_SHARE[device.type] * free, _HOST_SHARE * available_bytes(torch.device("cpu"))]
    limits = [math.inf if gib is None else gib * 2**30 for gib in (design.gpu_gib, design.host_gib)]
    blocks = [int(min(pair) / (block_size * bytes_per_token)) for pair in zip(room, limits, strict=True)]
    if blocks[0] < 1:
        raise ConfigError(f"{design.device} has no room for model {model.name} in {design.dtype} and a cache beside it")
    return CacheConfig(blocks[0], blocks[1], block_size, bytes_per_token)


def _num_gpu_blocks(memory: str, design: Design, cache: CacheConfig) -> int:
    if memory == "all":
        return cache.num_gpu_blocks
    kind, _, count = memory.partition(":")
    if kind == "tokens" and count.isdecimal():
        tokens = int(count)
    else:
        tokens = load_profile(f"{memory}/{design.model}-tp1").kv_capacity_tokens
    blocks = tokens // cache.block_size
    if not 1 <= blocks <= cache.num_gpu_blocks:
        raise ConfigError(
            f"memory {memory!r} is {blocks} blocks; the pool on {design.device} has {cache.num_gpu_blocks}"
        )
    return blocks


# -- recording -------------------------------------------------------------------------------------------------------


def record(design: Design, recorded: Path, minutes: float | None = None) -> bool:
    """Make the runs of the design that `recorded` lacks; whether all are there now.

    `recorded`/profile.json, which `fastserve profile` writes, gives the policies their iteration times. With `minutes`,
    no run begins that by the simulator's account would not end in time.

    Raises ConfigError where the folder's plan is of another design or profile, and for what does not fit the machine.
    """
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    plan = _plan_of(design, recorded)
    missing = [each for each in plan.runs if not each.is_there(recorded)]
    print(f"{len(plan.runs) - len(missing)} of {len(plan.runs)} runs are there", flush=True)
    worker: Worker | None = None
    for each in missing:
        expected_s = _simulated_duration(each, recorded)
        left_s = deadline - time.monotonic()
        if _LONGER_THAN_SIMULATED * expected_s + _AROUND_A_RUN_S > left_s:
            print(f"{left_s:.0f} s are left, {each.name} takes some {expected_s:.0f}: the rest is for another time")
            return False
        if worker is None:
            worker = _make_worker(plan)
            _warm_up(plan, worker)
            if time.monotonic() + _LONGER_THAN_SIMULATED * expected_s + _AROUND_A_RUN_S > deadline:
                print("no time is left after loading and warming up: give more minutes")
                return False
        gc.collect()
        gc.freeze()  # What is there stays: no pass over it in the middle of a run.
        summary = _make_run(plan, each, recorded, worker)
        print(
            f"{each.name}, {each.config.num_requests} requests at {each.config.rate:g}/s: "
            f"{summary['mean_normalized_latency_s']:.4f} s/token, {summary['duration_s']:.1f} s "
            f"(simulated {expected_s:.1f})",
            flush=True,
        )
    return True


def _plan_of(design: Design, recorded: Path) -> Plan:
    """The folder's plan; made now if it has none."""
    profile = recorded / "profile.json"
    load_profile(str(profile))
    check_writable(recorded / "plan.json")
    if not (recorded / "plan.json").is_file():
        plan = make_plan(design, profile)
        plan.save(recorded / "plan.json")
        return plan
    plan = read_plan(recorded)
    anew = f"give another folder, or remove {recorded / 'plan.json'} and {recorded / 'runs'} to begin anew"
    for field in fields(Design):
        was, now = (getattr(each, field.name) for each in (plan.design, design))
        if was != now:
            raise ConfigError(f"{recorded} is being recorded with {field.name} {was!r}, not {now!r}; {anew}")
    if plan.profile_sha256 != _sha256(profile):
        raise ConfigError(f"{profile} is not the one that the plan rests on; {anew}")
    return plan


def _simulated_duration(each: RecordedRun, recorded: Path) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        return float(run(simulated(each.config, recorded / "profile.json"), Path(scratch))["duration_s"])


def _make_worker(plan: Plan) -> Worker:
    from fastserve.runtime.models.source import resolve_model
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
    """Two full batches of each trace at once, in the smallest cache and the largest batch: prompts of many lengths,
    decodes of all batch sizes, copies both ways."""
    size = max(plan.design.max_batch_sizes)
    blocks = min(each.config.settings["num_gpu_blocks"] for each in plan.runs)
    for trace in plan.design.traces:
        like = next(each.config for each in plan.runs if each.config.trace == trace)
        settings = {**like.settings, "max_batch_size": size, "num_gpu_blocks": blocks}
        config = replace(like, policy="fastserve", rate=AT_ONCE, num_requests=2 * size, settings=settings)
        with tempfile.TemporaryDirectory() as scratch:
            run(config, Path(scratch), worker=worker)


def _make_run(plan: Plan, each: RecordedRun, recorded: Path, worker: Worker) -> dict[str, Any]:
    """Make a run in a folder of its own, which takes its name when all is in it."""
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
    """Keeps when each transfer took place, in seconds on the engine's clock."""

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


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- the command -----------------------------------------------------------------------------------------------------


def add_design_options(parser: argparse.ArgumentParser) -> None:
    """An option for each field of Design."""
    default = Design()
    several = {"max_batch_sizes": int, "traces": str, "memories": str, "loads": float, "policies": str}
    numbers = {"seconds": float, "fewest_requests": int, "seed": int, "gpu_gib": float, "host_gib": float}
    for field in fields(Design):
        name, value = field.name, getattr(default, field.name)
        option = f"--{name.replace('_', '-')}"
        if name in several:
            shown = " ".join(map(str, value))
            parser.add_argument(option, nargs="+", type=several[name], default=value, help=f"(default: {shown})")
        else:
            parser.add_argument(option, type=numbers.get(name, str), default=value, help="(default: %(default)s)")


def design_of(options: argparse.Namespace) -> Design:
    """The design that these options say. Raises ConfigError for values out of range."""
    return _design_from({field.name: getattr(options, field.name) for field in fields(Design)})


def design_arguments(design: Design) -> Iterator[str]:
    """The options that say this design."""
    for name, value in asdict(design).items():
        if value is not None:
            yield f"--{name.replace('_', '-')}"
            yield from map(str, value) if isinstance(value, tuple) else [str(value)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: exits with 0 when all runs are there, with `MORE_TO_DO` when time ran out, with 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that holds profile.json; the runs go there")
    parser.add_argument("--minutes", type=float, help="begin no run that would not end in time (default: no bound)")
    add_design_options(parser)
    options = parser.parse_args(arguments)
    try:
        done = record(design_of(options), options.out, options.minutes)
    except FastServeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if done else MORE_TO_DO)


if __name__ == "__main__":
    main()

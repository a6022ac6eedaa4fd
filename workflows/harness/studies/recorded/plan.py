"""The plan of a recording: every run in its order, with rates and sizes of the pools for this machine."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from fastserve.core.config import CacheConfig, EngineOptions, ModelConfig, dtype_bytes
from fastserve.core.errors import ConfigError
from fastserve.core.files import check_writable
from fastserve.latency import load_profile
from fastserve.policies.settings import resolve_settings
from harness.analysis.files import write_json
from harness.run.config import RunConfig
from harness.studies.recorded.design import DEVICE_SHARE, HOST_SHARE, Design, design_from
from harness.studies.simulations import service_rate, simulated

BASELINE = "fastserve-fcfs"
"""The policy whose service rate is the load of 1."""
_REQUESTS_AT_ONCE = 400
"""Requests of the simulation that gives the service rate."""


@dataclass(frozen=True)
class RecordedRun:
    """A run of the plan, recorded or not."""

    name: str
    memory: str
    load: float
    config: RunConfig

    def folder(self, recorded: Path) -> Path:
        """The folder of the run's files."""
        return recorded / "runs" / self.name

    def is_there(self, recorded: Path) -> bool:
        """Whether the run has been recorded."""
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
        """Write the plan as JSON, in one step."""
        write_json(asdict(self), path)


def read_plan(recorded: Path) -> Plan:
    """Read the plan of a folder. Raises ConfigError if it is missing or malformed."""
    path = recorded / "plan.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        own_profile = {"profile": str(recorded / "profile.json")}  # Wherever the folder is now.
        runs = (RecordedRun(**{**each, "config": RunConfig(**each["config"] | own_profile)}) for each in data["runs"])
        return Plan(design_from(data["design"]), CacheConfig(**data["cache"]), data["profile_sha256"], tuple(runs))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot read the plan {path}: {error}; give a folder that recording has written") from error


def plan_of(design: Design, recorded: Path) -> Plan:
    """Read the folder's plan, or make and write it if the folder has none.

    Raises ConfigError if the plan is of another design or profile.
    """
    profile = recorded / "profile.json"
    load_profile(str(profile))
    check_writable(recorded / "plan.json")
    if not (recorded / "plan.json").is_file():
        plan = make_plan(design, profile)
        plan.save(recorded / "plan.json")
        return plan
    plan = read_plan(recorded)
    anew = f"give another folder, or remove {recorded / 'plan.json'} and {recorded / 'runs'} to start again"
    for field in fields(Design):
        was, now = (getattr(each, field.name) for each in (plan.design, design))
        if was != now:
            raise ConfigError(f"{recorded} is being recorded with {field.name} {was!r}, not {now!r}; {anew}")
    if plan.profile_sha256 != _sha256(profile):
        raise ConfigError(f"{profile} is not the profile that the plan rests on; {anew}")
    return plan


def make_plan(design: Design, profile: Path) -> Plan:
    """Size the pools for this machine, find the rates by simulations with `profile`, and list every run.

    The order is that of the design, with all policies of a load next to each other: an interrupted recording leaves
    complete comparisons. Raises ConfigError if the model or a memory does not fit.
    """
    from fastserve.runtime.models.source import resolve_model  # Imports torch.

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
    """The pools that fit this machine's memory and the design's bounds."""
    from fastserve.runtime.worker.memory import available_bytes

    block_size = EngineOptions().block_size
    bytes_per_token = model.kv_bytes_per_token(design.dtype)
    free = available_bytes(design.device) - model.num_parameters() * dtype_bytes(design.dtype)
    room = [DEVICE_SHARE[design.device.partition(":")[0]] * free, HOST_SHARE * available_bytes("cpu")]
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


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

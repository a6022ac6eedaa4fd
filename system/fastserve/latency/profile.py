"""Profiles: measurements of one model on one machine, as JSON files by name (`a100-80g/opt-13b-tp1`)."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fastserve.core.checks import require_int
from fastserve.core.errors import ConfigError
from fastserve.core.files import atomic_write
from fastserve.core.presets import PRESETS
from fastserve.latency.base import LatencyModel
from fastserve.latency.checks import LARGEST_BATCH, check_bandwidth, check_times
from fastserve.latency.communication import AllReduce, HostLink, StageLink
from fastserve.latency.engine_time import NO_ENGINE_TIME, EngineTime
from fastserve.latency.fitted import FittedLatency, PrefillCurve
from fastserve.latency.kernel_latency import KernelLatency
from fastserve.latency.kernel_tables import KernelTables
from fastserve.latency.measured_range import MeasuredRange
from fastserve.latency.pipelined import PipelinedLatency
from fastserve.latency.with_engine_time import WithEngineTime

_SHIPPED = Path(__file__).parent / "profiles"

Kind = Literal["measured kernels", "fitted", "roofline"]
"""What iteration times come from: kernels timed alone, a fit to timed iterations, or the sizes of model and GPU."""


@dataclass(frozen=True, slots=True)
class Profile:
    """One model on one machine: iteration times, cache size, host link, and the source of the numbers."""

    name: str
    model: str
    hardware: str
    engine: str
    dtype: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    stage: FittedLatency | KernelLatency
    """Time of the first pipeline stage, and of every other one unless `later_stages` says otherwise. Without the
    all-reduces if `all_reduce` prices them, otherwise with them."""
    kv_capacity_tokens: int
    """Tokens of KV cache that fit beside the weights, over all GPUs."""
    kv_bytes_per_token: int
    """Of one token's cache, over all GPUs."""
    host_link: HostLink
    provenance: dict[str, Any]
    """Source, date, residuals and assumptions, as in the file."""
    stage_link: StageLink | None = None
    """From one stage to the next; None where there is one stage."""
    later_stages: tuple[FittedLatency | KernelLatency, ...] = ()
    """Times of the second stage to the last; empty where they are the first one's."""
    all_reduce: AllReduce | None = None
    """Among the shards of a stage; None where there is one shard, or where `stage` has it already."""
    context_tokens: int | None = None
    """The model's context as the file says it; None in files that do not, such as those of published models."""
    engine_time: EngineTime = NO_ENGINE_TIME
    """The engine's own time, which `stage` does not contain."""
    measured_range: MeasuredRange | None = None
    """Where the times were measured; None: not known."""
    kind: Kind | None = None
    """Where the times come from; None in files that do not say."""
    known_error: str | None = None
    """How far the times were found to be from measured ones, and which; None: not known."""
    largest_kv_bytes_per_token: int | None = None
    """Of one token's cache on the GPU with the largest part; None: the GPUs have equal parts."""

    def __post_init__(self) -> None:
        require_int("pipeline_parallel_size", self.pipeline_parallel_size, 1)
        if self.largest_kv_bytes_per_token == self._equal_kv_part:
            object.__setattr__(self, "largest_kv_bytes_per_token", None)
        largest = self.largest_kv_bytes_per_token
        if largest is not None and not self._equal_kv_part <= largest <= self.kv_bytes_per_token:
            raise ConfigError(
                f"profile {self.name}: kv_cache.largest_bytes_per_token is {largest}; the largest of "
                f"{self.tensor_parallel_size * self.pipeline_parallel_size} GPUs' parts of a token's "
                f"{self.kv_bytes_per_token} bytes is at least {self._equal_kv_part} and at most all of them"
            )
        if self.context_tokens is not None:
            require_int(f"profile {self.name}: context_tokens", self.context_tokens, 2)
        if (self.stage_link is None) != (self.pipeline_parallel_size == 1):
            raise ConfigError(
                f"profile {self.name}: stage_link is {'missing' if self.stage_link is None else 'given'} with "
                f"pipeline_parallel_size {self.pipeline_parallel_size}; give it if there are several stages, only then"
            )
        if self.later_stages and len(self.later_stages) != self.pipeline_parallel_size - 1:
            raise ConfigError(
                f"profile {self.name}: later_stages has {len(self.later_stages)} stages, with pipeline_parallel_size "
                f"{self.pipeline_parallel_size}; give {self.pipeline_parallel_size - 1}, the second to the last, or "
                "none if all are as the first"
            )
        if self.all_reduce is None:
            return
        if self.tensor_parallel_size == 1:
            raise ConfigError(
                f"profile {self.name}: all_reduce is given with tensor_parallel_size 1; leave it out: one shard "
                "sums nothing"
            )
        if len(self.all_reduce.per_stage) != self.pipeline_parallel_size:
            raise ConfigError(
                f"profile {self.name}: all_reduce.per_stage={self.all_reduce.per_stage} names "
                f"{len(self.all_reduce.per_stage)} stages, pipeline_parallel_size is {self.pipeline_parallel_size}; "
                "give a number for each stage"
            )
        if isinstance(self.stage, KernelLatency):
            raise ConfigError(f"profile {self.name}: all_reduce is given with kernel tables, which contain it")

    @property
    def rank_kv_bytes_per_token(self) -> int:
        """Bytes that one token's cache takes on the GPU with the largest part."""
        return self.largest_kv_bytes_per_token or self._equal_kv_part

    @property
    def _equal_kv_part(self) -> int:
        return -(-self.kv_bytes_per_token // (self.tensor_parallel_size * self.pipeline_parallel_size))

    @property
    def stages(self) -> tuple[LatencyModel, ...]:
        """Time of each stage, from the first, with its all-reduces and the engine's own time, but for transfers."""
        own = (self.stage, *(self.later_stages or (self.stage,) * (self.pipeline_parallel_size - 1)))
        stages: list[LatencyModel] = [
            stage.plus(*self.all_reduce.of_stage(i)) if self.all_reduce and isinstance(stage, FittedLatency) else stage
            for i, stage in enumerate(own)
        ]
        if not self.engine_time.is_zero:
            stages[0] = WithEngineTime(stages[0], self.engine_time)
        return tuple(stages)

    @property
    def max_model_len(self) -> int | None:
        """Longest prompt + output of the model in tokens, or None if neither the file nor a preset of its name says.

        A server of the profile is bounded by it; a simulation by the cache alone.
        """
        if self.context_tokens is not None:
            return self.context_tokens
        known = PRESETS.get(self.model)
        return None if known is None else known.max_model_len

    @property
    def latency(self) -> LatencyModel:
        """Time of an iteration through all stages, with nothing else in flight."""
        stages = self.stages
        return stages[0] if self.stage_link is None else PipelinedLatency(stages, self.stage_link)

    def to_json(self) -> dict[str, Any]:
        """Return the file's content."""
        content = {
            "format_version": self._format_version,
            "model": self.model,
            "hardware": self.hardware,
            "engine": self.engine,
            "dtype": self.dtype,
            "tensor_parallel_size": self.tensor_parallel_size,
            "pipeline_parallel_size": self.pipeline_parallel_size,
            **_first_stage_to_json(self.stage),
            "kv_cache": self._kv_cache_to_json(),
            "host_link": asdict(self.host_link),
            "stage_link": _stage_link_to_json(self.stage_link) if self.stage_link else None,
        }
        if self.later_stages:
            content["later_stages"] = [_stage_to_json(stage) for stage in self.later_stages]
        if self.all_reduce:
            content["all_reduce"] = asdict(self.all_reduce)
        if self.context_tokens is not None:
            content["context_tokens"] = self.context_tokens
        if self.engine_time.source != "none":
            content["engine_time"] = asdict(self.engine_time)
        if self.measured_range is not None:
            content["range"] = asdict(self.measured_range)
        if self.kind is not None:
            content["kind"] = self.kind
        if self.known_error is not None:
            content["known_error"] = self.known_error
        return content | {"provenance": self.provenance}

    def _kv_cache_to_json(self) -> dict[str, int]:
        whole = {"capacity_tokens": self.kv_capacity_tokens, "bytes_per_token": self.kv_bytes_per_token}
        if self.largest_kv_bytes_per_token is None:
            return whole
        return whole | {"largest_bytes_per_token": self.largest_kv_bytes_per_token}

    @property
    def _format_version(self) -> int:
        if self.largest_kv_bytes_per_token is not None:
            return 6
        if (
            isinstance(self.stage, KernelLatency)
            or self.engine_time.source != "none"
            or (self.measured_range, self.kind, self.known_error) != (None, None, None)
        ):
            return 5
        if self.later_stages or self.all_reduce or (self.stage_link and self.stage_link.rendezvous):
            return 4
        return 3 if isinstance(self.stage.prefill, PrefillCurve) else 2

    def save(self, path: Path) -> None:
        """Write the profile atomically. OutputError if it cannot be written."""
        with atomic_write(path) as staging:
            staging.write_text(_to_text(self.to_json()) + "\n", encoding="utf-8")


def list_profiles() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(path.relative_to(_SHIPPED).with_suffix("").as_posix() for path in _SHIPPED.rglob("*.json"))


def load_profile(name: str) -> Profile:
    """Return the shipped profile called `name`, or the profile in the JSON file at that path.

    Raises ConfigError, which names the file, the key and the value, for a file that cannot be read or that holds an
    unknown key, a number that is not finite, a unit other than seconds, or impossible times.
    """
    path = Path(name) if name.endswith(".json") else _SHIPPED / f"{name}.json"
    if not path.is_file():
        raise ConfigError(
            f"no profile {name!r}: give the path of a .json file written by `fastserve profile`, or one of: "
            + ", ".join(list_profiles())
        )
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"profile {path} cannot be read: {reason}; it must be JSON, in UTF-8") from error
    return _parse(name, content)


def _parse(name: str, content: str) -> Profile:
    from fastserve.latency.profile_file import parse_profile  # Imports pydantic, which only a file needs.

    where = f"profile {name}"
    data = parse_profile(where, content)
    stage = _latency_of(data.first_stage)
    profile = Profile(
        name=name.removesuffix(".json"),
        model=data.model,
        hardware=data.hardware,
        engine=data.engine,
        dtype=data.dtype,
        tensor_parallel_size=data.tensor_parallel_size,
        pipeline_parallel_size=data.pipeline_parallel_size,
        stage=stage,
        kv_capacity_tokens=data.kv_cache.capacity_tokens,
        kv_bytes_per_token=data.kv_cache.bytes_per_token,
        largest_kv_bytes_per_token=data.kv_cache.largest_bytes_per_token,
        host_link=data.host_link,
        provenance=data.provenance,
        stage_link=data.stage_link,
        later_stages=tuple(_latency_of(each) for each in data.stages_after),
        all_reduce=data.all_reduce,
        context_tokens=data.context_tokens,
        engine_time=data.engine_time,
        measured_range=data.range or (stage.tables.range if isinstance(stage, KernelLatency) else None),
        kind=data.kind,
        known_error=data.known_error,
    )
    for key in ("host_link", "stage_link", "all_reduce"):
        if (link := getattr(profile, key)) is not None:
            check_bandwidth(f"{where}: {key}.bandwidth_bytes_per_s", link.bandwidth_bytes_per_s)
    batches = _corner_batches(profile.stage)
    for i, model in enumerate(profile.stages):
        of_stage = f"{where}: stage {i}" if len(profile.stages) > 1 else where
        check_times(of_stage, model, batches, profile.kv_capacity_tokens)
    return profile


def _corner_batches(stage: FittedLatency | KernelLatency) -> list[int]:
    """Numbers of decodes where the times of a stage change their slope, and the largest that is checked."""
    if isinstance(stage, KernelLatency):
        return [1, *(decodes for decodes, _ in stage.tables.decode), LARGEST_BATCH]
    ends = [fit.max_batch_size for fit in stage.decode if fit.max_batch_size is not None]
    return [1, *ends, *(end + 1 for end in ends), LARGEST_BATCH]


def _latency_of(stage: FittedLatency | KernelTables) -> FittedLatency | KernelLatency:
    return KernelLatency(stage) if isinstance(stage, KernelTables) else stage


def _to_text(content: dict[str, Any]) -> str:
    """JSON with a line for each row of kernel tables, which would otherwise take a line for each number."""
    tables = [content["kernels"], *content.get("later_stages", ())] if "kernels" in content else []
    rows: list[str] = []

    def as_mark(value: Any) -> str:
        rows.append(json.dumps(value))
        return f"@{len(rows) - 1}@"

    for table in tables:
        for key, value in table.items():
            if isinstance(value, tuple):
                table[key] = [as_mark(row) for row in value]
            elif isinstance(value, dict):
                table[key] = as_mark(value)
    text = json.dumps(content, indent=2)
    return re.sub(r'"@(\d+)@"', lambda mark: rows[int(mark[1])], text) if rows else text


def _stage_link_to_json(link: StageLink) -> dict[str, Any]:
    """Without `rendezvous` where it is not so: versions before 4 do not know the word."""
    return {key: value for key, value in asdict(link).items() if key != "rendezvous" or value}


def _first_stage_to_json(stage: FittedLatency | KernelLatency) -> dict[str, Any]:
    if isinstance(stage, KernelLatency):
        return {"kernels": _stage_to_json(stage)}
    return {"coefficients": {"unit": "seconds", **_stage_to_json(stage)}}


def _stage_to_json(stage: FittedLatency | KernelLatency) -> dict[str, Any]:
    if isinstance(stage, KernelLatency):
        return asdict(stage.tables)
    prefill = stage.prefill
    return {
        "prefill": _curve_to_json(prefill) if isinstance(prefill, PrefillCurve) else asdict(prefill),
        "decode": [
            {
                "max_batch_size": fit.max_batch_size,
                "constant": fit.constant,
                "per_context_token": fit.per_context_token,
                "per_request": fit.per_request,
            }
            for fit in stage.decode
        ],
    }


def _curve_to_json(curve: PrefillCurve) -> dict[str, Any]:
    points = [list(point) for point in zip(curve.num_tokens, curve.seconds, strict=True)]
    return {"curve": points, "per_token_squared": curve.per_token_squared}

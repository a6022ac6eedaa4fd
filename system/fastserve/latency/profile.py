"""Profiles: measurements of one model on one machine, as JSON files by name (`a100-80g/opt-13b-tp1`)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastserve.core.checks import require_int
from fastserve.core.errors import ConfigError
from fastserve.core.files import atomic_write
from fastserve.core.presets import PRESETS
from fastserve.latency.base import LatencyModel
from fastserve.latency.checks import check_bandwidth, check_times
from fastserve.latency.communication import AllReduce, HostLink, StageLink
from fastserve.latency.fitted import FittedLatency, PrefillCurve
from fastserve.latency.pipelined import PipelinedLatency

_SHIPPED = Path(__file__).parent / "profiles"


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
    stage: FittedLatency
    """Time of the first pipeline stage, and of every other one unless `later_stages` says otherwise. Without the
    all-reduces if `all_reduce` prices them, otherwise with them."""
    kv_capacity_tokens: int
    """Tokens of KV cache that fit beside the weights, over all GPUs."""
    kv_bytes_per_token: int
    host_link: HostLink
    provenance: dict[str, Any]
    """Source, date, residuals and assumptions, as in the file."""
    stage_link: StageLink | None = None
    """From one stage to the next; None where there is one stage."""
    later_stages: tuple[FittedLatency, ...] = ()
    """Times of the second stage to the last; empty where they are the first one's."""
    all_reduce: AllReduce | None = None
    """Among the shards of a stage; None where there is one shard, or where `stage` has it already."""
    context_tokens: int | None = None
    """The model's context as the file says it; None in files that do not, such as those of published models."""

    def __post_init__(self) -> None:
        require_int("pipeline_parallel_size", self.pipeline_parallel_size, 1)
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

    @property
    def stages(self) -> tuple[FittedLatency, ...]:
        """Time of each stage, from the first, with its all-reduces."""
        stages = (self.stage, *(self.later_stages or (self.stage,) * (self.pipeline_parallel_size - 1)))
        if self.all_reduce is None:
            return stages
        return tuple(stage.plus(*self.all_reduce.of_stage(i)) for i, stage in enumerate(stages))

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
            "coefficients": {"unit": "seconds", **_stage_to_json(self.stage)},
            "kv_cache": {"capacity_tokens": self.kv_capacity_tokens, "bytes_per_token": self.kv_bytes_per_token},
            "host_link": asdict(self.host_link),
            "stage_link": _stage_link_to_json(self.stage_link) if self.stage_link else None,
        }
        if self.later_stages:
            content["later_stages"] = [_stage_to_json(stage) for stage in self.later_stages]
        if self.all_reduce:
            content["all_reduce"] = asdict(self.all_reduce)
        if self.context_tokens is not None:
            content["context_tokens"] = self.context_tokens
        return content | {"provenance": self.provenance}

    @property
    def _format_version(self) -> int:
        if self.later_stages or self.all_reduce or (self.stage_link and self.stage_link.rendezvous):
            return 4
        return 3 if isinstance(self.stage.prefill, PrefillCurve) else 2

    def save(self, path: Path) -> None:
        """Write the profile atomically. OutputError if it cannot be written."""
        with atomic_write(path) as staging:
            staging.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")


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
    profile = Profile(
        name=name.removesuffix(".json"),
        model=data.model,
        hardware=data.hardware,
        engine=data.engine,
        dtype=data.dtype,
        tensor_parallel_size=data.tensor_parallel_size,
        pipeline_parallel_size=data.pipeline_parallel_size,
        stage=data.coefficients.fit(),
        kv_capacity_tokens=data.kv_cache.capacity_tokens,
        kv_bytes_per_token=data.kv_cache.bytes_per_token,
        host_link=data.host_link,
        provenance=data.provenance,
        stage_link=data.stage_link,
        later_stages=tuple(stage.fit() for stage in data.later_stages),
        all_reduce=data.all_reduce,
        context_tokens=data.context_tokens,
    )
    for key in ("host_link", "stage_link", "all_reduce"):
        if (link := getattr(profile, key)) is not None:
            check_bandwidth(f"{where}: {key}.bandwidth_bytes_per_s", link.bandwidth_bytes_per_s)
    for i, stage in enumerate(profile.stages):
        check_times(f"{where}: stage {i}" if len(profile.stages) > 1 else where, stage, profile.kv_capacity_tokens)
    return profile


def _stage_link_to_json(link: StageLink) -> dict[str, Any]:
    """Without `rendezvous` where it is not so: versions before 4 do not know the word."""
    return {key: value for key, value in asdict(link).items() if key != "rendezvous" or value}


def _stage_to_json(stage: FittedLatency) -> dict[str, Any]:
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

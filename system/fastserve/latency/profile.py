"""Profiles: what was measured of one model on one machine, as JSON files by name (`a100-80g/opt-13b-tp1`)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastserve.config import require_int, require_positive
from fastserve.errors import ConfigError
from fastserve.files import atomic_write
from fastserve.latency.base import LatencyModel
from fastserve.latency.communication import AllReduce, HostLink, StageLink
from fastserve.latency.fitted import DecodeFit, FittedLatency, PrefillCurve, PrefillFit
from fastserve.latency.pipelined import PipelinedLatency

FORMAT_VERSION = 4
"""Version 1 had no `stage_link` and one stage only, version 2 no `curve`, version 3 no `later_stages`, no `all_reduce`
and no `rendezvous`; their files are still read. A profile is written in the lowest version, from 2 on, that can say it.
"""
_SHIPPED = Path(__file__).parent / "profiles"


@dataclass(frozen=True, slots=True)
class Profile:
    """One model on one machine: iteration times, cache size, host link, and where the numbers come from."""

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

    def __post_init__(self) -> None:
        require_int("pipeline_parallel_size", self.pipeline_parallel_size, 1)
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
                f"profile {self.name}: all_reduce is given with tensor_parallel_size 1; leave it out, one shard has "
                "nobody to sum with"
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
    def latency(self) -> LatencyModel:
        """Time of an iteration through all stages, with nothing else in flight."""
        stages = self.stages
        return stages[0] if self.stage_link is None else PipelinedLatency(stages, self.stage_link)

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
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
        return content | {"provenance": self.provenance}

    @property
    def _format_version(self) -> int:
        if self.later_stages or self.all_reduce or (self.stage_link and self.stage_link.rendezvous):
            return 4
        return 3 if isinstance(self.stage.prefill, PrefillCurve) else 2

    def save(self, path: Path) -> None:
        """Write the profile whole; OutputError if it cannot be written."""
        with atomic_write(path) as staging:
            staging.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")


def list_profiles() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(path.relative_to(_SHIPPED).with_suffix("").as_posix() for path in _SHIPPED.rglob("*.json"))


def load_profile(name: str) -> Profile:
    """The shipped profile called `name`, or the one in the JSON file at that path."""
    path = Path(name) if name.endswith(".json") else _SHIPPED / f"{name}.json"
    if not path.is_file():
        raise ConfigError(
            f"no profile {name!r}: give the path of a .json file written by `fastserve profile`, or one of: "
            + ", ".join(list_profiles())
        )
    try:
        return _parse(name.removesuffix(".json"), json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"profile {path} is malformed: {type(error).__name__}: {error}") from error


def _parse(name: str, data: dict[str, Any]) -> Profile:
    if data["format_version"] not in range(1, FORMAT_VERSION + 1):
        raise ConfigError(f"profile {name}: format_version {data['format_version']!r}, expected 1 to {FORMAT_VERSION}")
    cache = data["kv_cache"]
    for key in ("capacity_tokens", "bytes_per_token"):
        require_int(f"profile {name}: kv_cache.{key}", cache[key], 1)
    return Profile(
        name=name,
        model=data["model"],
        hardware=data["hardware"],
        engine=data["engine"],
        dtype=data["dtype"],
        tensor_parallel_size=data["tensor_parallel_size"],
        pipeline_parallel_size=data["pipeline_parallel_size"],
        stage=_parse_stage(name, data["coefficients"]),
        kv_capacity_tokens=cache["capacity_tokens"],
        kv_bytes_per_token=cache["bytes_per_token"],
        host_link=HostLink(**data["host_link"]),
        provenance=data["provenance"],
        stage_link=StageLink(**data["stage_link"]) if data.get("stage_link") else None,
        later_stages=tuple(_parse_stage(name, fits) for fits in data.get("later_stages", ())),
        all_reduce=AllReduce(**data["all_reduce"]) if data.get("all_reduce") else None,
    )


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


def _parse_stage(name: str, fits: dict[str, Any]) -> FittedLatency:
    decode = fits["decode"]
    stage = FittedLatency(
        _parse_prefill(name, fits["prefill"]),
        tuple(
            DecodeFit(
                float(fit["constant"]),
                float(fit["per_context_token"]),
                float(fit["per_request"]),
                fit["max_batch_size"],
            )
            for fit in decode
        ),
    )
    if not decode or decode[-1]["max_batch_size"] is not None:
        raise ConfigError(f"profile {name}: the last decode fit must have max_batch_size null")
    require_positive(f"profile {name}: time of a decode step", stage.iteration_time([], [1]))
    return stage


def _curve_to_json(curve: PrefillCurve) -> dict[str, Any]:
    points = [list(point) for point in zip(curve.num_tokens, curve.seconds, strict=True)]
    return {"curve": points, "per_token_squared": curve.per_token_squared}


def _parse_prefill(name: str, prefill: dict[str, Any]) -> PrefillFit | PrefillCurve:
    per_token_squared = float(prefill["per_token_squared"])
    if "curve" not in prefill:
        return PrefillFit(float(prefill["constant"]), float(prefill["per_token"]), per_token_squared)
    points = [(int(num_tokens), float(seconds)) for num_tokens, seconds in prefill["curve"]]
    num_tokens = tuple(point[0] for point in points)
    if not points or any(left >= right for left, right in pairwise(num_tokens)):
        raise ConfigError(f"profile {name}: prefill.curve must have points, of ascending numbers of tokens")
    return PrefillCurve(num_tokens, tuple(point[1] for point in points), per_token_squared)

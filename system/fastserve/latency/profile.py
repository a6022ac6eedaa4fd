"""Profiles: what was measured of one model on one machine, as JSON files by name (`a100-80g/opt-13b-tp1`)."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastserve.core.checks import require_int
from fastserve.core.config import dtype_bytes
from fastserve.core.errors import ConfigError
from fastserve.core.files import atomic_write
from fastserve.core.presets import PRESETS
from fastserve.latency.base import LatencyModel
from fastserve.latency.checks import check_bandwidth, check_times, fields, number, text
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
        if self.context_tokens is not None:
            content["context_tokens"] = self.context_tokens
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
    """The shipped profile called `name`, or the one in the JSON file at that path.

    Raises ConfigError, which names the file, the key and the value, for a file that cannot be read or that holds an
    unknown key, a number that is not finite, a unit other than seconds, or times that cannot be true.
    """
    path = Path(name) if name.endswith(".json") else _SHIPPED / f"{name}.json"
    if not path.is_file():
        raise ConfigError(
            f"no profile {name!r}: give the path of a .json file written by `fastserve profile`, or one of: "
            + ", ".join(list_profiles())
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"profile {path} cannot be read: {reason}; it must be JSON, in UTF-8") from error
    return _parse(name, data)


def _parse(name: str, data: Any) -> Profile:
    where = f"profile {name}"
    required = (
        "format_version", "model", "hardware", "engine", "dtype", "tensor_parallel_size", "pipeline_parallel_size",
        "coefficients", "kv_cache", "host_link", "provenance",
    )  # fmt: skip
    data = fields(where, data, required, ("stage_link", "later_stages", "all_reduce", "context_tokens"))
    if data["format_version"] not in range(1, FORMAT_VERSION + 1):
        raise ConfigError(f"{where}: format_version {data['format_version']!r}, expected 1 to {FORMAT_VERSION}")
    for key in ("tensor_parallel_size", "pipeline_parallel_size"):
        require_int(f"{where}: {key}", data[key], 1)
    if not isinstance(data["provenance"], dict):
        raise ConfigError(f"{where}: provenance must be an object, got {data['provenance']!r}")
    try:
        dtype_bytes(text("dtype", data["dtype"]))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    cache = fields(f"{where}: kv_cache", data["kv_cache"], ("capacity_tokens", "bytes_per_token"))
    for key, value in cache.items():
        require_int(f"{where}: kv_cache.{key}", value, 1)
    links: dict[str, Any] = {}
    for key, cls in (("host_link", HostLink), ("stage_link", StageLink), ("all_reduce", AllReduce)):
        links[key] = _parse_link(where, key, cls, data[key]) if data.get(key) is not None else None
    later = data.get("later_stages", ())
    if not isinstance(later, list | tuple):
        raise ConfigError(f"{where}: later_stages must be a list, got {later!r}")
    profile = Profile(
        name=name.removesuffix(".json"),
        model=text(f"{where}: model", data["model"]),
        hardware=text(f"{where}: hardware", data["hardware"]),
        engine=text(f"{where}: engine", data["engine"]),
        dtype=data["dtype"],
        tensor_parallel_size=data["tensor_parallel_size"],
        pipeline_parallel_size=data["pipeline_parallel_size"],
        stage=_parse_stage(f"{where}: coefficients", data["coefficients"]),
        kv_capacity_tokens=cache["capacity_tokens"],
        kv_bytes_per_token=cache["bytes_per_token"],
        host_link=links["host_link"],
        provenance=data["provenance"],
        stage_link=links["stage_link"],
        later_stages=tuple(_parse_stage(f"{where}: later_stages[{i}]", fits) for i, fits in enumerate(later)),
        all_reduce=links["all_reduce"],
        context_tokens=data.get("context_tokens"),
    )
    for i, stage in enumerate(profile.stages):
        check_times(f"{where}: stage {i}" if len(profile.stages) > 1 else where, stage, profile.kv_capacity_tokens)
    return profile


def _parse_link(where: str, key: str, cls: type[Any], data: Any) -> Any:
    """A link of that class, its numbers checked."""
    optional = [field.name for field in dataclasses.fields(cls) if field.default is not dataclasses.MISSING]
    required = [field.name for field in dataclasses.fields(cls) if field.name not in optional]
    given = dict(fields(f"{where}: {key}", data, required, optional))
    for name in ("latency_s", "bandwidth_bytes_per_s"):
        given[name] = number(f"{where}: {key}.{name}", given[name])
    if "per_stage" in given and not isinstance(given["per_stage"], list):
        raise ConfigError(f"{where}: {key}.per_stage must be a list, got {given['per_stage']!r}")
    try:
        link = cls(**given)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    check_bandwidth(f"{where}: {key}.bandwidth_bytes_per_s", given["bandwidth_bytes_per_s"])
    return link


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


def _parse_stage(where: str, data: Any) -> FittedLatency:
    fits = fields(where, data, ("prefill", "decode"), ("unit",))
    if fits.get("unit", "seconds") not in ("seconds", "s"):
        raise ConfigError(f"{where}.unit is {fits['unit']!r}; give every coefficient in seconds, and unit 'seconds'")
    if not isinstance(fits["decode"], list) or not fits["decode"]:
        raise ConfigError(f"{where}.decode must be a list of at least one fit, got {fits['decode']!r}")
    decode, least = [], 1
    for i, each in enumerate(fits["decode"]):
        one = f"{where}.decode[{i}]"
        fit = fields(one, each, ("constant", "per_context_token", "per_request", "max_batch_size"))
        numbers = {name: number(f"{one}.{name}", value) for name, value in fit.items() if name != "max_batch_size"}
        most = fit["max_batch_size"]
        if (most is None) != (i == len(fits["decode"]) - 1):
            raise ConfigError(
                f"{one}.max_batch_size is {most!r}; it must be null in the last decode fit, a number in the others"
            )
        if most is not None:
            require_int(f"{one}.max_batch_size", most, least)
            least = most + 1
        decode.append(DecodeFit(**numbers, max_batch_size=most))
    return FittedLatency(_parse_prefill(f"{where}.prefill", fits["prefill"]), tuple(decode))


def _curve_to_json(curve: PrefillCurve) -> dict[str, Any]:
    points = [list(point) for point in zip(curve.num_tokens, curve.seconds, strict=True)]
    return {"curve": points, "per_token_squared": curve.per_token_squared}


def _parse_prefill(where: str, data: Any) -> PrefillFit | PrefillCurve:
    if not isinstance(data, dict) or "curve" not in data:
        names = ("constant", "per_token", "per_token_squared")
        fit = fields(where, data, names)
        return PrefillFit(*(number(f"{where}.{name}", fit[name]) for name in names))
    curve = fields(where, data, ("curve", "per_token_squared"))
    points = curve["curve"]
    if not isinstance(points, list) or not points or not all(isinstance(one, list) and len(one) == 2 for one in points):
        raise ConfigError(f"{where}.curve must be a list of pairs, tokens and seconds, with at least one")
    for i, (num_tokens, _) in enumerate(points):
        require_int(f"{where}.curve[{i}][0]", num_tokens, points[i - 1][0] + 1 if i else 1)
    seconds = tuple(number(f"{where}.curve[{i}][1]", value) for i, (_, value) in enumerate(points))
    squared = number(f"{where}.per_token_squared", curve["per_token_squared"])
    return PrefillCurve(tuple(point[0] for point in points), seconds, squared)

"""A profile's file: its keys and their values, as pydantic models. Imported when a file is read, not before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from fastserve.core.config import dtype_bytes
from fastserve.core.errors import ConfigError
from fastserve.core.options import option_names
from fastserve.latency.communication import AllReduce, HostLink, StageLink
from fastserve.latency.engine_time import NO_ENGINE_TIME, EngineTime
from fastserve.latency.fitted import DecodeFit, FittedLatency, PrefillCurve, PrefillFit
from fastserve.latency.kernel_tables import Curve, KernelTables
from fastserve.latency.measured_range import MeasuredRange
from fastserve.latency.profile import Kind

FORMAT_VERSION = 6
"""Version 1 had no `stage_link` and one stage only, version 2 no `curve`, version 3 no `later_stages`, no `all_reduce`
and no `rendezvous`, version 4 no `kernels`, `engine_time`, `range`, `kind` and `known_error`, version 5 no
`largest_bytes_per_token`; their files are still read. A profile is written in the lowest version, from 2 on, that can
say it.
"""

Count = Annotated[int, Field(ge=1, le=10**12)]
Text = Annotated[str, Field(min_length=1)]


class _Keys(BaseModel):
    """An object of the file: these keys and no others, with values of exactly these types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _check_curve(points: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    least = 1
    for i, (num_tokens, _) in enumerate(points):
        if num_tokens < least:
            raise ValueError(f"[{i}][0] must be an integer of at least {least}, got {num_tokens}")
        least = num_tokens + 1
    return points


class _Curve(_Keys):
    curve: Annotated[tuple[tuple[int, float], ...], Field(min_length=1), AfterValidator(_check_curve)]
    """Tokens and seconds of each point."""
    per_token_squared: float

    def fit(self) -> PrefillCurve:
        num_tokens, seconds = zip(*self.curve, strict=True)
        return PrefillCurve(num_tokens, seconds, self.per_token_squared)


def _check_decode(fits: tuple[DecodeFit, ...]) -> tuple[DecodeFit, ...]:
    *bounded, last = fits
    if last.max_batch_size is not None or any(fit.max_batch_size is None for fit in bounded):
        i = next((i for i, fit in enumerate(bounded) if fit.max_batch_size is None), len(bounded))
        raise ValueError(
            f"[{i}].max_batch_size is {fits[i].max_batch_size!r}; it must be null in the last decode fit, a number in "
            "the others"
        )
    least = 1
    for i, fit in enumerate(bounded):
        assert fit.max_batch_size is not None
        if fit.max_batch_size < least:
            raise ValueError(f"[{i}].max_batch_size must be an integer of at least {least}, got {fit.max_batch_size}")
        least = fit.max_batch_size + 1
    return fits


def _prefill_kind(prefill: Any) -> str:
    return "(curve)" if isinstance(prefill, dict) and "curve" in prefill else "(line)"


def _stage_kind(stage: Any) -> str:
    return "(tables)" if isinstance(stage, dict) and "dense" in stage else "(fit)"


class _Stage(_Keys):
    unit: Annotated[str, Field(pattern=r"^(s|seconds)$")] = "seconds"
    prefill: Annotated[
        Annotated[PrefillFit, Tag("(line)")] | Annotated[_Curve, Tag("(curve)")], Discriminator(_prefill_kind)
    ]
    decode: Annotated[tuple[DecodeFit, ...], Field(min_length=1), AfterValidator(_check_decode)]

    def fit(self) -> FittedLatency:
        return FittedLatency(self.prefill.fit() if isinstance(self.prefill, _Curve) else self.prefill, self.decode)


class _KVCache(_Keys):
    capacity_tokens: Count
    bytes_per_token: Count
    largest_bytes_per_token: Count | None = None


def _check_dtype(dtype: str) -> str:
    dtype_bytes(dtype)
    return dtype


class ProfileFile(_Keys):
    """What the file holds."""

    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)]
    model: Text
    hardware: Text
    engine: Text
    dtype: Annotated[str, AfterValidator(_check_dtype)]
    tensor_parallel_size: Count
    pipeline_parallel_size: Count
    coefficients: _Stage | None = None
    kernels: KernelTables | None = None
    kv_cache: _KVCache
    host_link: HostLink
    stage_link: StageLink | None = None
    later_stages: tuple[
        Annotated[
            Annotated[_Stage, Tag("(fit)")] | Annotated[KernelTables, Tag("(tables)")], Discriminator(_stage_kind)
        ],
        ...,
    ] = ()
    all_reduce: AllReduce | None = None
    context_tokens: Annotated[int, Field(ge=2, le=10**12)] | None = None
    engine_time: EngineTime = NO_ENGINE_TIME
    range: MeasuredRange | None = None
    kind: Kind | None = None
    known_error: Text | None = None
    provenance: dict[str, Any]

    @model_validator(mode="after")
    def _has_one_kind_of_stage(self) -> ProfileFile:
        if (self.coefficients is None) == (self.kernels is None):
            found = "neither" if self.coefficients is None else "both"
            raise ValueError(f"has {found} of coefficients and kernels; give one of them, the times of a stage")
        if any(isinstance(stage, KernelTables) != (self.kernels is not None) for stage in self.later_stages):
            raise ValueError(
                "has later_stages of another kind than its first stage; give fits or kernel tables for all"
            )
        return self

    @property
    def first_stage(self) -> FittedLatency | KernelTables:
        """Times of the first stage."""
        if self.coefficients is not None:
            return self.coefficients.fit()
        assert self.kernels is not None
        return self.kernels

    @property
    def stages_after(self) -> list[FittedLatency | KernelTables]:
        """Times of the second stage to the last."""
        return [stage if isinstance(stage, KernelTables) else stage.fit() for stage in self.later_stages]


_OBJECTS: dict[str, type] = {
    "": ProfileFile,
    "coefficients": _Stage,
    "later_stages": _Stage,
    "(line)": PrefillFit,
    "(curve)": _Curve,
    "decode": DecodeFit,
    "kernels": KernelTables,
    "(tables)": KernelTables,
    "dense": Curve,
    "per_sequence": Curve,
    "engine_time": EngineTime,
    "range": MeasuredRange,
    "kv_cache": _KVCache,
    "host_link": HostLink,
    "stage_link": StageLink,
    "all_reduce": AllReduce,
}
"""Objects of the file by the key that holds them."""
_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")


def parse_profile(where: str, content: str) -> ProfileFile:
    """Parse a file's content. ConfigError names the file (`where`), the key, the value and what would be right."""
    try:
        return ProfileFile.model_validate_json(content)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        unknown = [each for each in errors if each["type"] in _UNKNOWN_KEY]
        raise ConfigError(f"{where}: {_explain((unknown or errors)[0])}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _explain(error: Any) -> str:
    kind, context = error["type"], error.get("ctx", {})
    *parents, key = error["loc"] or ("",)
    if kind in _UNKNOWN_KEY:
        return f"{_path(parents)} has an unknown key {key!r}; known: {', '.join(_known_keys(parents))}"
    where = _path(error["loc"])
    if kind in ("missing", "missing_argument"):
        return f"{where} is missing"
    if kind == "value_error":
        problem = str(context["error"])
        return where + problem if problem.startswith("[") else f"{where} {problem}"
    if kind == "json_invalid":
        return f"cannot be read: {context['error']}; it must be JSON, in UTF-8"
    rule = _RULES.get(kind, error["msg"]).format(**context)
    return f"{where} must be {rule}, got {_shown(error['input'])}"


_RULES = {
    "float_type": "a finite number",
    "finite_number": "a finite number",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing_size": "an integer of at most 10**12",
    "greater_than_equal": "an integer of at least {ge}",
    "less_than_equal": "an integer of at most {le}",
    "string_type": "a text",
    "string_too_short": "a text",
    "string_pattern_mismatch": "'seconds', with every coefficient in seconds",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "too_short": "a list with at least {min_length} entry",
    "too_long": "a list with at most {max_length} entries",
    "dict_type": "an object",
    "model_type": "an object",
    "dataclass_type": "an object",
}
"""Pydantic's errors in the words of a reader of JSON."""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _path(keys: Iterable[str | int]) -> str:
    """Such as `coefficients.decode[0].constant`."""
    path = ""
    for key in keys:
        if isinstance(key, int):
            path += f"[{key}]"
        elif not key.startswith("("):  # The kind of prefill is not in the file.
            path += f".{key}" if path else key
    return path or "the profile"


def _known_keys(parents: Iterable[str | int]) -> list[str]:
    """Keys of the object at this path."""
    holder = [key for key in parents if isinstance(key, str)]
    found = _OBJECTS[holder[-1] if holder else ""]
    return list(found.model_fields) if issubclass(found, BaseModel) else option_names(found)

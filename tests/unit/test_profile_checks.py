"""What a profile's file may not hold: each fault is named with the file, the key and the value, and the remedy."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.errors import ConfigError
from fastserve.latency import list_profiles, load_profile

DATA = load_profile("a100-80g/opt-66b-tp2-pp2-swifttransformer").to_json()
CURVE = {"curve": [[16, 0.02], [1024, 0.1]], "per_token_squared": 1e-9}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The profile with another value at `a.b.0.c`; ... removes it."""
    data = copy.deepcopy(DATA)
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    at: Any = data
    for key in parents:
        at = at[key]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return data


def load(folder: Path, data: Any) -> Any:
    path = folder / "own.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return load_profile(str(path))


def refused(folder: Path, data: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, data)
    message = str(caught.value)
    assert "/own" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("coefficients.decode.0.constant", -0.5, "gives -0.4999 s for 1 decode over 1 token; every time up to the"),
        ("coefficients.decode.0.constant", float("nan"), "decode[0].constant must be a finite number, got nan"),
        ("coefficients.decode.1.per_request", -1e-3, "for 95 decodes over 95 tokens; every time up to"),
        ("coefficients.decode.1.per_context_token", -1e-3, "tokens; every time up to the"),
        ("coefficients.decode.0.per_context_token", float("inf"), "must be a finite number, got inf"),
        ("coefficients.decode.0.per_request", "0.1", "decode[0].per_request must be a finite number, got '0.1'"),
        ("coefficients.decode.0.per_request", True, "must be a finite number, got True"),
        ("coefficients.decode.0.per_request", 10**400, "must be a finite number, got 1000"),
        (
            "coefficients.decode.0.per_requests",
            0.1,
            "decode[0] has an unknown key 'per_requests'; known: constant, per",
        ),
        ("coefficients.decode.0.constant", ..., "decode[0].constant is missing"),
        ("coefficients.decode.0.max_batch_size", 0, "decode[0].max_batch_size must be an integer of at least 1, got 0"),
        ("coefficients.decode.0.max_batch_size", None, "decode[0].max_batch_size is None; it must be null in the last"),
        ("coefficients.decode.1.max_batch_size", 200, "decode[1].max_batch_size is 200; it must be null in the last"),
        ("coefficients.decode", {}, "decode must be a list, got {}"),
        (
            "coefficients.prefill.per_token_squared",
            -1e-6,
            "gives -0.008905 s for 1 prompt of 256 tokens; every time up to the",
        ),
        (
            "coefficients.prefill.constant",
            18.1,
            "gives 18.1 s for 1 prompt of 1 token; a time is in seconds, this one",
        ),
        ("coefficients.decode.0.constant", 19_934.0, "a time is in seconds, this one must be from 1e-06 to 10"),
        ("coefficients.prefill", CURVE | {"constant": 1}, "prefill has an unknown key 'constant'; known: curve, per_"),
        (
            "coefficients.prefill",
            CURVE | {"curve": [[16, float("nan")]]},
            "curve[0][1] must be a finite number, got nan",
        ),
        ("coefficients.prefill", CURVE | {"curve": [[16, -1.0]]}, "gives -1 s for 1 prompt of 1 token"),
        ("coefficients.prefill", 3, "prefill must be an object, got 3"),
        ("coefficients.unit", "ms", "coefficients.unit must be 'seconds', with every coefficient in seconds, got 'ms'"),
        (
            "coefficients.unit",
            "milliseconds",
            "unit must be 'seconds', with every coefficient in seconds, got 'milliseconds'",
        ),
        ("kv_cache.capacity_tokens", 0, "kv_cache.capacity_tokens must be an integer of at least 1, got 0"),
        ("kv_cache.capacity_tokens", 1e5, "kv_cache.capacity_tokens must be an integer, got 100000.0"),
        ("kv_cache.tokens", 5, "kv_cache has an unknown key 'tokens'; known: capacity_tokens, bytes_per_token"),
        ("host_link.latency_s", -1.0, "host_link.latency_s must be a finite number of at least 0, got -1.0"),
        ("host_link.latency_s", None, "host_link.latency_s must be a finite number, got None"),
        ("host_link.bandwidth_bytes_per_s", 25, "host_link.bandwidth_bytes_per_s must be in bytes/s, got 25"),
        ("host_link.bandwith", 25, "host_link has an unknown key 'bandwith'; known: bandwidth_bytes_per_s, latency_s"),
        ("stage_link.bytes_per_token", 1.5, "stage_link.bytes_per_token must be an integer, got 1.5"),
        ("stage_link", None, "stage_link is missing with pipeline_parallel_size 2"),
        ("tensor_parallel_size", "2", "tensor_parallel_size must be an integer, got '2'"),
        ("pipeline_parallel_size", 0, "pipeline_parallel_size must be an integer of at least 1, got 0"),
        ("dtype", "fp8", "unknown dtype 'fp8'; known: float32, bfloat16, float16"),
        ("model", 13, "model must be a text, got 13"),
        ("engine", "", "engine must be a text, got ''"),
        ("provenance", "mine", "provenance must be an object, got 'mine'"),
        ("later_stages", 3, "later_stages must be a list, got 3"),
        ("format_version", "2", "format_version must be an integer, got '2'"),
        ("hardwear", "x", "has an unknown key 'hardwear'; known: format_version, model, hardware"),
    ],
)
def test_a_fault_is_named(tmp_path: Path, path: str, value: Any, message: str) -> None:
    assert message in refused(tmp_path, changed(path, value))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", "3", '"x"', "[]", "{}", "\ufeff{}"])
def test_a_file_that_is_no_profile_is_named(tmp_path: Path, text: str) -> None:
    refused(tmp_path, text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match=r"own\.json cannot be read: UnicodeDecodeError.*must be JSON, in UTF-8"):
        load_profile(str(tmp_path / "own.json"))


@pytest.mark.parametrize("name", list_profiles())
def test_every_shipped_profile_passes_and_is_written_as_it_was_read(tmp_path: Path, name: str) -> None:
    profile = load_profile(name)
    assert load(tmp_path, profile.to_json()).to_json() == profile.to_json()


def test_what_passes_has_no_time_below_zero_anywhere(tmp_path: Path) -> None:
    """Whatever the coefficients are, a profile is refused or all its times are positive."""

    @given(
        st.tuples(*[st.floats(-0.1, 0.1)] * 3), st.tuples(*[st.floats(-1e-3, 1e-3)] * 3),
        st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 5000)), min_size=20, max_size=20),
    )  # fmt: skip
    def check(decode: tuple[float, ...], prefill: tuple[float, ...], shapes: list[tuple[int, int]]) -> None:
        data = copy.deepcopy(DATA)
        data["coefficients"]["decode"] = [
            dict(zip(("constant", "per_context_token", "per_request"), decode, strict=True)) | {"max_batch_size": None}
        ]
        data["coefficients"]["prefill"] = dict(
            zip(("constant", "per_token", "per_token_squared"), prefill, strict=True)
        )
        try:
            profile = load(tmp_path, data)
        except ConfigError:
            return
        for batch, context in shapes:
            contexts = [min(context, profile.kv_capacity_tokens // batch)] * batch
            assert profile.stage.iteration_time((), contexts) > 0

    check()


def test_beyond_what_was_measured_a_curve_never_falls(tmp_path: Path) -> None:
    prefill = {"curve": [[16, 0.02], [512, 0.1], [1024, 0.05]], "per_token_squared": 0.0}
    profile = load(tmp_path, changed("coefficients.prefill", prefill))
    assert profile.stage.iteration_time([60_000], []) == pytest.approx(0.05)

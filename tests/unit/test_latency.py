import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.errors import ConfigError
from fastserve.latency import (
    DecodeFit,
    FittedLatency,
    HostLink,
    PipelinedLatency,
    PrefillFit,
    StageLink,
    list_profiles,
    load_profile,
)
from fastserve.latency.profiler import Grid, Measurement, fit, measure, residuals


def test_opt_13b_takes_what_the_published_coefficients_say() -> None:
    latency = load_profile("a100-80g/opt-13b-tp1").latency
    # By hand, in ms: 18.1025 + 0.101912 * 300 + 7.12226e-6 * (100^2 + 200^2) = 49.032
    assert latency.iteration_time([100, 200], []) == pytest.approx(49.0323e-3, rel=1e-4)
    # 19.9347 + 6.26936e-4 * 1600 + 0.038507 * 16 = 21.554
    assert latency.iteration_time([], [100] * 16) == pytest.approx(21.5539e-3, rel=1e-4)
    # From 95 requests on, the other fit: 7.16619 + 5.798e-4 * 9500 + 0.158311 * 95 = 27.714
    assert latency.iteration_time([], [100] * 95) == pytest.approx(27.7138e-3, rel=1e-4)


def test_a_mixed_iteration_reads_the_weights_once() -> None:
    latency = FittedLatency(PrefillFit(3.0, 0.1, 0.01), (DecodeFit(2.0, 0.5, 0.25),))
    assert latency.iteration_time([2, 4], [1, 3]) == pytest.approx(3.0 + 0.1 * 6 + 0.01 * 20 + 0.5 * 4 + 0.25 * 2)
    assert latency.iteration_time([], []) == 0


@pytest.mark.parametrize("name", list_profiles())
def test_every_shipped_profile_loads_and_makes_sense(name: str) -> None:
    profile = load_profile(name)
    longer = profile.latency.iteration_time([512], [])
    assert 0 < profile.latency.iteration_time([], [1]) < longer
    assert profile.kv_capacity_tokens >= 2048
    assert profile.provenance["source"]


def test_a_profile_survives_being_written_and_read(tmp_path: Path) -> None:
    profile = load_profile("a100-80g/opt-66b-tp4")
    path = tmp_path / "copy.json"
    profile.save(path)
    again = load_profile(str(path))
    assert again.to_json() == profile.to_json()
    assert [file.name for file in tmp_path.iterdir()] == ["copy.json"]


def test_unknown_and_malformed_profiles_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no profile 'a100/opt'.*a100-80g/opt-13b-tp1"):
        load_profile("a100/opt")
    path = tmp_path / "bad.json"
    for text, reason in (("{", "JSONDecodeError"), ("{}", "format_version"), ("[]", "TypeError")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=reason):
            load_profile(str(path))
    data = json.loads(json.dumps(load_profile("a100-80g/opt-13b-tp1").to_json()))
    data["host_link"]["bandwidth_bytes_per_s"] = 0
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"bandwidth_bytes_per_s must be a finite number above 0, got 0"):
        load_profile(str(path))


def test_the_fit_recovers_a_known_machine() -> None:
    truth = FittedLatency(PrefillFit(0.02, 1e-4, 1e-8), (DecodeFit(0.015, 6e-7, 4e-5),))
    shapes = Grid.for_model(2048, 16).shapes
    measurements = measure(truth.iteration_time, shapes, repeats=1)
    fitted = fit(measurements)
    report = residuals(fitted, measurements)
    assert all(report[kind]["max_relative_error"] < 1e-6 for kind in ("prefill", "decode", "mixed"))
    assert len(report["measurements"]) == len(shapes)


def test_the_fit_is_never_negative_and_reports_what_it_misses() -> None:
    measurements = [Measurement((n,), (), t) for n, t in ((10, 0.03), (100, 0.02), (1000, 0.05))]
    measurements += [Measurement((), (n,), 0.01) for n in (10, 100)]
    fitted = fit(measurements)
    assert min(fitted.prefill.constant, fitted.prefill.per_token, fitted.prefill.per_token_squared) >= 0
    assert residuals(fitted, measurements)["prefill"]["max_relative_error"] > 0.05


def test_a_transfer_takes_latency_and_bytes_over_bandwidth() -> None:
    assert HostLink(100.0, 0.5).transfer_time(200) == 2.5


STAGE = FittedLatency(PrefillFit(0.011, 1.3e-4, 7e-9), (DecodeFit(0.009, 3e-7, 4e-5, 8), DecodeFit(0.008, 2e-7, 5e-5)))


@given(
    contexts=st.lists(st.integers(1, 2048), min_size=1, max_size=16),
    count=st.integers(1, 40),
    num_stages=st.integers(2, 5),
)
def test_a_pipeline_foresees_its_decode_steps_to_the_bit(contexts: list[int], count: int, num_stages: int) -> None:
    latency = PipelinedLatency(STAGE, num_stages, StageLink(17e-6, 8e9, 24_576))
    one_by_one = [latency.iteration_time((), [length + step for length in contexts]) for step in range(count)]
    assert latency.decode_times(contexts, count).tolist() == one_by_one


def test_an_iteration_alone_passes_every_stage_and_every_link() -> None:
    latency = PipelinedLatency(STAGE, 3, StageLink(0.5, 100.0, 10))
    # 3 stages, and 2 sends of 4 + 1 tokens: 0.5 s + 50 B / 100 B/s each.
    assert latency.iteration_time([4], [7], [2]) == pytest.approx(3 * STAGE.iteration_time([4], [7], [2]) + 2.0)
    assert latency.iteration_time([], []) == 0


def test_one_stage_is_its_own_pipeline() -> None:
    profile = load_profile("a100-80g/opt-13b-tp1")
    assert profile.latency is profile.stage


def test_a_profile_of_several_stages_is_of_one_stage_and_a_link(tmp_path: Path) -> None:
    one = load_profile("a100-80g/opt-13b-tp1")
    link = StageLink(24e-6, 8e9, 10_240)
    two = replace(one, pipeline_parallel_size=2, stage_link=link)
    assert two.latency == PipelinedLatency(one.stage, 2, link)
    two.save(tmp_path / "two.json")
    assert load_profile(str(tmp_path / "two.json")).latency == two.latency
    for wrong in ({"stage_link": link}, {"pipeline_parallel_size": 2}):
        with pytest.raises(ConfigError, match=r"stage_link is (missing|given) with pipeline_parallel_size [12]"):
            replace(one, **wrong)


def test_a_file_of_the_first_version_is_still_read(tmp_path: Path) -> None:
    profile = load_profile("a100-80g/opt-13b-tp1")
    data = profile.to_json() | {"format_version": 1}
    del data["stage_link"]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(data))
    assert load_profile(str(path)).to_json() == profile.to_json()

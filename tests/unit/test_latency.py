import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.errors import ConfigError
from fastserve.latency import (
    DecodeFit,
    FittedLatency,
    HostLink,
    PipelinedLatency,
    PrefillCurve,
    PrefillFit,
    StageLink,
    list_profiles,
    load_profile,
)
from fastserve.latency.fitting import (
    Grid,
    Measurement,
    Shape,
    StageTimes,
    by_stage,
    fit,
    measure,
    overhead_by_batch,
    residuals,
    times_between,
    with_overhead,
)


def test_opt_13b_takes_what_the_published_coefficients_say() -> None:
    latency = load_profile("a100-80g/opt-13b-tp1-swifttransformer").latency
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
    profile = load_profile("a100-80g/opt-66b-tp4-swifttransformer")
    path = tmp_path / "copy.json"
    profile.save(path)
    again = load_profile(str(path))
    assert again.to_json() == profile.to_json()
    assert [file.name for file in tmp_path.iterdir()] == ["copy.json"]


def test_unknown_and_malformed_profiles_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no profile 'a100/opt'.*a100-80g/opt-13b-tp1-swifttransformer"):
        load_profile("a100/opt")
    path = tmp_path / "bad.json"
    for text, reason in (
        ("{", "it must be JSON, in UTF-8"),
        ("{}", "format_version"),
        ("[]", "must be an object, got"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=reason):
            load_profile(str(path))
    data = json.loads(json.dumps(load_profile("a100-80g/opt-13b-tp1-swifttransformer").to_json()))
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


CURVE = PrefillCurve((8, 64, 128, 192, 256), (0.006, 0.006, 0.007, 0.010, 0.013), 1e-9)


def test_a_curve_is_linear_between_its_points_and_goes_on_after_them() -> None:
    for num_tokens, seconds in zip(CURVE.num_tokens, CURVE.seconds, strict=True):
        assert CURVE.of_tokens(num_tokens) == seconds
    assert CURVE.of_tokens(1) == 0.006
    assert CURVE.of_tokens(96) == pytest.approx(0.0065)
    # After the last point as from 128 to 256.
    assert CURVE.of_tokens(512) == pytest.approx(0.013 + 256 * 0.006 / 128)
    assert PrefillCurve((8,), (0.006,), 0.0).of_tokens(9) == 0.006


def test_by_a_curve_a_mixed_iteration_is_of_the_tokens_of_both() -> None:
    latency = FittedLatency(CURVE, (DecodeFit(0.005, 1e-6, 1e-4),))
    expected = CURVE.of_tokens(60 + 4) + 1e-9 * (20 * 20 + 40 * 40) + 1e-6 * 400
    assert latency.iteration_time([20, 40], [100] * 4) == pytest.approx(expected)
    chunk = CURVE.of_tokens(60) + 1e-9 * (60 * 60 + 2 * 60 * 100)
    assert latency.iteration_time([60], [], [100]) == pytest.approx(chunk)
    assert latency.iteration_time([], [100] * 4) == pytest.approx(0.005 + 4e-4 + 4e-4)


def weights_then_arithmetic(prefill_lens: Sequence[int], context_lens: Sequence[int]) -> float:
    """A GPU as it is: reading the weights hides the arithmetic of few tokens, and products are cut every 128 tokens."""
    tokens = sum(prefill_lens) + len(context_lens)
    pieces = -(-tokens // 128) * 128
    attention = 3e-9 * sum(n * n for n in prefill_lens) + 2e-7 * sum(context_lens)
    return max(6e-3, 4.3e-5 * pieces) + attention


def test_a_dense_grid_follows_a_gpu_where_a_line_cannot() -> None:
    grid = Grid.dense(2048, 64, 2048, (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64))
    measurements = measure(weights_then_arithmetic, grid.shapes, repeats=1)
    curve, line = fit(measurements, by_batch_size=True, curve=True), fit(measurements)
    others: list[Shape] = [((length,), ()) for length in range(20, 2040, 37)]
    others += [((length // 3, length // 2), ()) for length in range(20, 2040, 61)]
    others += [((), (700,) * size) for size in range(1, 65)]
    others += [((length,), (300,) * size) for length in (40, 200, 900) for size in (3, 30)]
    errors = {
        name: np.array([abs(latency.iteration_time(*s) / weights_then_arithmetic(*s) - 1) for s in others])
        for name, latency in (("curve", curve), ("line", line))
    }
    # Every point of the grid, and most between them: next to a step the curve cuts its corner.
    assert residuals(curve, measurements)["prefill"]["max_relative_error"] < 1e-6
    assert np.median(errors["curve"]) < 0.005
    assert np.mean(errors["curve"]) < 0.02
    assert np.mean(errors["curve"]) < np.mean(errors["line"]) / 3
    assert np.max(errors["line"]) > 0.2


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(
    ("max_model_len", "max_batch_size", "token_budget"), [(2048, 64, 2048), (40, 3, 2048), (9, 1, 4)]
)
def test_a_dense_grid_stays_within_model_budget_and_batch(
    max_model_len: int, max_batch_size: int, token_budget: int, quick: bool
) -> None:
    sizes = (1, 2, 200)
    shapes = Grid.dense(max_model_len, max_batch_size, token_budget, sizes, quick=quick).shapes
    assert len(set(shapes)) == len(shapes)
    for prompts, contexts in shapes:
        assert all(1 <= n < max_model_len for n in prompts)
        assert all(2 <= n < max_model_len for n in contexts)
        assert sum(prompts) <= token_budget
        assert len(contexts) <= max_batch_size
    assert max(len(contexts) for _, contexts in shapes) == max_batch_size
    assert max(sum(prompts) for prompts, _ in shapes) == min(token_budget, max_model_len - 1)


def test_an_engines_own_time_is_a_line_over_the_batch_that_no_outlier_moves() -> None:
    sizes = [size for size in range(1, 33) for _ in range(3)]
    gaps = [50e-6 + 2e-6 * size for size in sizes]
    gaps[5] = gaps[40] = 0.1
    starts = np.cumsum([0.0, *(0.01 + gap for gap in gaps)])
    between = times_between(starts, starts + 0.01)
    seconds, per_request = overhead_by_batch(between, sizes)
    assert (seconds, per_request) == pytest.approx((50e-6, 2e-6))
    assert overhead_by_batch([3e-6, 5e-6, 4e-6], [8, 8, 8]) == pytest.approx((4e-6, 0.0))
    latency = with_overhead(FittedLatency(CURVE, (DecodeFit(0.005, 1e-6, 1e-4),)), seconds, per_request)
    assert latency.iteration_time([64], []) == pytest.approx(0.006 + 64 * 64e-9 + 50e-6)
    assert latency.iteration_time([], [10] * 4) == pytest.approx(0.005 + 40e-6 + 4e-4 + 50e-6 + 8e-6)


def test_a_profile_with_a_curve_is_written_and_read(tmp_path: Path) -> None:
    plain = replace(load_profile("a100-80g/opt-13b-tp1-swifttransformer"), measured_range=None, kind=None)
    curved = replace(plain, stage=replace(plain.stage, prefill=CURVE))
    curved.save(tmp_path / "curve.json")
    assert load_profile(str(tmp_path / "curve.json")).stage == curved.stage
    data = curved.to_json()
    # A reader of version 2 can read a profile without a curve.
    assert (plain.to_json()["format_version"], data["format_version"]) == (2, 3)
    for points, message in (
        ([], r"prefill\.curve must be a list with at least 1 entry, got"),
        ([[8, 0.1], [8, 0.2]], r"prefill\.curve\[1\]\[0\] must be an integer of at least 9, got 8"),
    ):
        data["coefficients"]["prefill"]["curve"] = points
        (tmp_path / "bad.json").write_text(json.dumps(data))
        with pytest.raises(ConfigError, match=message):
            load_profile(str(tmp_path / "bad.json"))


def test_a_transfer_takes_latency_and_bytes_over_bandwidth() -> None:
    assert HostLink(100.0, 0.5).transfer_time(200) == 2.5


STAGE = FittedLatency(PrefillFit(0.011, 1.3e-4, 7e-9), (DecodeFit(0.009, 3e-7, 4e-5, 8), DecodeFit(0.008, 2e-7, 5e-5)))


@given(
    contexts=st.lists(st.integers(1, 2048), min_size=1, max_size=16),
    count=st.integers(1, 40),
    num_stages=st.integers(2, 5),
)
def test_a_pipeline_foresees_its_decode_steps_to_the_bit(contexts: list[int], count: int, num_stages: int) -> None:
    latency = PipelinedLatency((STAGE,) * num_stages, StageLink(17e-6, 8e9, 24_576))
    one_by_one = [latency.iteration_time((), [length + step for length in contexts]) for step in range(count)]
    assert latency.decode_times(contexts, count).tolist() == one_by_one


def test_an_iteration_alone_passes_every_stage_and_every_link() -> None:
    latency = PipelinedLatency((STAGE,) * 3, StageLink(0.5, 100.0, 10))
    # 3 stages, and 2 sends of 4 + 1 tokens: 0.5 s + 50 B / 100 B/s each.
    assert latency.iteration_time([4], [7], [2]) == pytest.approx(3 * STAGE.iteration_time([4], [7], [2]) + 2.0)
    assert latency.iteration_time([], []) == 0


def test_one_stage_is_its_own_pipeline() -> None:
    profile = load_profile("a100-80g/opt-13b-tp1-swifttransformer")
    assert profile.latency is profile.stage


def test_a_profile_of_several_stages_is_of_one_stage_and_a_link(tmp_path: Path) -> None:
    one = load_profile("a100-80g/opt-13b-tp1-swifttransformer")
    link = StageLink(24e-6, 8e9, 10_240)
    two = replace(one, pipeline_parallel_size=2, stage_link=link)
    assert two.latency == PipelinedLatency((one.stage,) * 2, link)
    two.save(tmp_path / "two.json")
    assert load_profile(str(tmp_path / "two.json")).latency == two.latency
    for wrong in ({"stage_link": link}, {"pipeline_parallel_size": 2}):
        with pytest.raises(ConfigError, match=r"stage_link is (missing|given) with pipeline_parallel_size [12]"):
            replace(one, **wrong)


def test_a_file_of_the_first_version_is_still_read(tmp_path: Path) -> None:
    profile = load_profile("a100-80g/opt-13b-tp1-swifttransformer")
    data = profile.to_json() | {"format_version": 1}
    del data["stage_link"]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(data))
    assert load_profile(str(path)).to_json() == profile.to_json()


def test_stages_whose_times_vary_take_as_long_as_the_slowest_each_time() -> None:
    shape = ((), (8, 8))
    link = StageLink(0.5, 1e9, 1)
    steady, uneven = ([StageTimes(times, 0.25) for times in all_times] for all_times in ([(2, 2)], [(1, 3), (3, 1)]))
    first, second = by_stage([shape], [steady], link, statistics.mean)
    assert (first[0].seconds, second[0].seconds) == (2, 2)
    first, second = by_stage([shape], [uneven], link, statistics.mean)
    # With what comes on top, (1.25, 3.5) and (3.25, 1.5): 3.375 a step in place of 2.5, and the second waits longer.
    assert first[0].seconds == 2
    assert second[0].seconds == pytest.approx(2 + 3.375 - 2.5)
    (alone,) = by_stage([shape], [[StageTimes((1,), 0.25), StageTimes((3,), 0.25)]], None, statistics.median)
    assert alone[0] == Measurement(*shape, 2)

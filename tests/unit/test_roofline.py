"""Predictions from sizes: what they count, how they are calibrated, and how far off they are."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.errors import ConfigError
from fastserve.core.presets import preset
from fastserve.latency import DecodeFit, FittedLatency, PrefillFit, Profile, StageLink, list_profiles, load_profile
from fastserve.latency.calibration import calibrate, relative_errors
from fastserve.latency.gpus import A100_40G, A100_80G
from fastserve.latency.roofline import LARGE_BATCH, Calibration, predict, transfer

PEAK = Calibration(weight_read=1.0, kv_read=1.0, decode_flops=1.0, prefill_flops=1.0, attention_flops=1.0)
OVERHEADS = Calibration(layer_overhead_s=1e-4, small_all_reduce_s=1e-5, step_overhead_s=2e-3, dispatch_overhead_s=9e-3)
SWIFT = replace(PEAK, weight_read=1.2, kv_read=1.7, layer_overhead_s=1e-4, small_all_reduce_s=2e-5, decode_flops=0.5)
VLLM = replace(SWIFT, kv_read=1.4, prefill_flops=1.9, step_overhead_s=3e-3, dispatch_overhead_s=8e-3)


def measured(model: str) -> Iterator[Profile]:
    profiles = (load_profile(name) for name in list_profiles() if name.startswith("a100-80g/"))
    return (profile for profile in profiles if "measured" in profile.provenance and profile.model == model)


def test_sizes_at_peak_by_hand() -> None:
    stage = predict(preset("opt-13b"), A100_80G, PEAK)
    # 40 layers of 12 * 5120^2 weights, 50272 * 5120 of the LM head; 2 bytes each at 2.04 TB/s.
    layers, head = 40 * 12 * 5120**2, 50_272 * 5120
    assert stage.decode[0].constant == pytest.approx(2 * (layers + head) / 2.04e12, rel=1e-3)
    assert stage.prefill.constant == stage.decode[0].constant
    assert stage.decode[0].per_context_token == pytest.approx(819_200 / 2.04e12)
    assert stage.decode[0].per_request == pytest.approx(2 * (layers + head) / 312e12, rel=1e-3)
    assert stage.prefill.per_token == pytest.approx(2 * layers / 312e12, rel=1e-3)
    assert stage.prefill.per_token_squared == pytest.approx(4 * 40 * 5120 / 312e12)


def test_grouped_query_attention_reads_its_kv_heads_only() -> None:
    stage = predict(preset("llama-3-8b"), A100_80G, PEAK)
    assert stage.decode[0].per_context_token == pytest.approx(2 * 32 * 8 * 128 * 2 / 2.04e12)
    # 8.03e9 weights, of which the 128256 x 4096 input embeddings are looked up and not read.
    assert stage.decode[0].constant == pytest.approx(2 * (8.03e9 - 128_256 * 4096) / 2.04e12, rel=1e-3)


def test_overheads_by_hand() -> None:
    config = preset("opt-66b")
    one = predict(config, A100_80G, OVERHEADS)
    assert one.decode[0].constant == pytest.approx(64e-4 + 2e-3)
    eight = predict(config, A100_80G, OVERHEADS, 8)
    assert eight.decode[0].constant == pytest.approx(64e-4 + 11e-3 + 128 * 3 * 1e-5)
    assert eight.prefill.constant == pytest.approx(64e-4 + 11e-3 + 128 * 81e-6)
    # 128 all-reduces of 9216 * 2 bytes a token, at 9.85 us a MiB.
    assert eight.prefill.per_token == pytest.approx(128 * 9216 * 2 * 9.85e-6 / 2**20)
    assert eight.decode[0].per_request == eight.prefill.per_token


def test_a_stage_has_its_share_of_the_layers_and_its_own_host() -> None:
    config = preset("opt-175b")
    whole, half = (predict(config, A100_80G, VLLM, 8, stages) for stages in (1, 2))
    host = VLLM.step_overhead_s + VLLM.dispatch_overhead_s
    assert half.decode[0].constant - host == pytest.approx((whole.decode[0].constant - host) / 2)
    assert half.prefill.constant - host == pytest.approx((whole.prefill.constant - host) / 2)
    for name in ("per_token", "per_token_squared"):
        assert getattr(half.prefill, name) == pytest.approx(getattr(whole.prefill, name) / 2)


@given(
    model=st.sampled_from(("opt-13b", "opt-175b", "llama-3-8b", "llama-2-70b")),
    tp=st.integers(1, 8),
    calibration=st.sampled_from((PEAK, SWIFT, VLLM)),
    context=st.integers(1, 2048),
)
def test_more_work_never_takes_less_time(model: str, tp: int, calibration: Calibration, context: int) -> None:
    stage = predict(preset(model), A100_80G, calibration, tp)
    times = [stage.iteration_time((), (context,) * batch) for batch in range(1, 2 * LARGE_BATCH)]
    assert times == sorted(times)
    steps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert steps[LARGE_BATCH - 2] == pytest.approx(steps[LARGE_BATCH - 1], rel=1e-6)  # No jump where the fits meet.


def test_what_cannot_be_split_is_refused() -> None:
    config = preset("opt-13b")
    for tp, pp, message in (
        (16, 1, "tensor_parallel_size must be at most 8, the GPUs of a node, got 16"),
        (0, 1, "tensor_parallel_size must be an integer of at least 1, got 0"),
        (1, 3, "pipeline_parallel_size must divide the 40 layers, got 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            predict(config, A100_80G, PEAK, tp, pp)


def test_calibration_recovers_a_machine_that_is_as_the_roofline_says() -> None:
    def profile(calibration: Calibration, engine: str, tp: int) -> Profile:
        stage = predict(preset("opt-13b"), A100_80G, calibration, tp)
        return replace(
            load_profile("a100-80g/opt-13b-tp1-swifttransformer"), engine=engine, tensor_parallel_size=tp, stage=stage
        )

    known = {"swifttransformer": SWIFT, "vllm": VLLM}
    found = calibrate(profile(known[engine], engine, tp) for engine in known for tp in (1, 2, 4))
    for engine, calibration in known.items():
        assert asdict(found[engine]) == pytest.approx(asdict(calibration), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("engine", "bound"), [("swifttransformer", 0.12), ("vllm", 0.19)])
def test_opt_66b_is_predicted_from_opt_13b_within_what_the_documentation_says(engine: str, bound: float) -> None:
    calibration = calibrate(measured("opt-13b"))[engine]
    held_out = [profile for profile in measured("opt-66b") if profile.engine == engine]
    assert len(held_out) == {"swifttransformer": 4, "vllm": 3}[engine]
    errors = [abs(error) for profile in held_out for error in relative_errors(profile, calibration)]
    assert max(errors) <= bound
    assert sum(errors) / len(errors) <= bound / 2


def test_a_calibration_says_what_it_cannot_use() -> None:
    profile = load_profile("a100-80g/opt-13b-tp1-swifttransformer")
    with pytest.raises(ConfigError, match=r"engine fastserve.*cannot calibrate"):
        calibrate([replace(profile, engine="fastserve")])
    two_stages = replace(profile, pipeline_parallel_size=2, stage_link=StageLink(0.0, 1e9, 10_240))
    with pytest.raises(ConfigError, match=r"pipeline_parallel_size 2\) cannot calibrate"):
        calibrate([two_stages])
    with pytest.raises(ConfigError, match="no measured profile"):
        calibrate([profile])  # None of vLLM.


def test_a_transfer_slows_what_is_memory_traffic() -> None:
    fit = FittedLatency(PrefillFit(0.02, 1e-4, 1e-8), (DecodeFit(0.018, 4e-7, 5e-5, 94), DecodeFit(0.01, 3e-7, 1e-4)))
    config = preset("opt-13b")
    assert transfer(fit, config, SWIFT, 1, A100_80G, A100_80G) == fit
    slower = transfer(fit, config, SWIFT, 2, A100_80G, A100_40G)
    # 25.7e9 bytes of weights over two GPUs, read at 1 / 1.2 of the bandwidth.
    added = 1.2 * 25.7e9 / 2 * (1 / 1.555e12 - 1 / 2.04e12)
    assert slower.prefill == replace(fit.prefill, constant=pytest.approx(0.02 + added, rel=1e-3))
    for before, after in zip(fit.decode, slower.decode, strict=True):
        assert after.constant == pytest.approx(before.constant + added, rel=1e-3)
        assert after.per_context_token == pytest.approx(before.per_context_token * 2.04 / 1.555)
        assert (after.per_request, after.max_batch_size) == (before.per_request, before.max_batch_size)


def test_a_fit_does_not_transfer_to_another_arithmetic() -> None:
    faster = replace(A100_80G, name="another", flops_per_s=990e12)
    fit = load_profile("a100-80g/opt-13b-tp1-swifttransformer").stage
    with pytest.raises(ConfigError, match="same FLOP/s only, not to another"):
        transfer(fit, preset("opt-13b"), SWIFT, 1, A100_80G, faster)


def test_a_transfer_agrees_with_the_roofline_where_the_fit_is_one() -> None:
    config = preset("opt-66b")
    measured_here = predict(config, A100_80G, SWIFT, 4)
    moved, predicted = (
        transfer(measured_here, config, SWIFT, 4, A100_80G, A100_40G),
        predict(config, A100_40G, SWIFT, 4),
    )
    for shape in (((512,), ()), ((), (500,) * 16), ((), (500,) * 128)):
        assert moved.iteration_time(*shape) == pytest.approx(predicted.iteration_time(*shape))

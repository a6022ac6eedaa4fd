"""What a simulation takes from its profile, and what the options replace."""

import dataclasses
from typing import Any

import pytest

from fastserve.core.config import EngineOptions
from fastserve.core.errors import ConfigError
from fastserve.core.parallel import ParallelConfig
from fastserve.core.presets import preset
from fastserve.core.request import Request, SamplingParams
from fastserve.engine import Arrival, EngineView, FinishedTransfer, Observer
from fastserve.latency import EngineTime, Profile, load_profile
from fastserve.scheduler import Iteration
from fastserve.simulation import simulated_engine

PROFILE = load_profile("a100-80g/opt-13b-tp1-swifttransformer")


def transfer_times(options: EngineOptions) -> list[tuple[int, float]]:
    """Bytes and seconds of every transfer, where two long requests share a cache that holds one."""
    engine = simulated_engine(PROFILE, "fastserve-fcfs", {"swap": "reactive"}, options)
    times: list[tuple[int, float]] = []

    class Timed(Observer):
        def on_transfer(self, finished: FinishedTransfer) -> None:
            times.append((finished.transfer.num_bytes, finished.end_s - finished.start_s))

    engine.observer = Timed()
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    engine.run([Arrival(Request(name, 0.0, 100), params) for name in "ab"])
    return times


def test_the_host_link_is_the_profiles_unless_told_otherwise() -> None:
    sizes = EngineOptions(num_gpu_blocks=24)
    for options, link in (
        (sizes, PROFILE.host_link),
        (
            dataclasses.replace(sizes, host_link_gb_per_s=5),
            dataclasses.replace(PROFILE.host_link, bandwidth_bytes_per_s=5e9),
        ),
    ):
        times = transfer_times(options)
        assert times
        assert [seconds for _, seconds in times] == pytest.approx([link.transfer_time(size) for size, _ in times])


@pytest.mark.parametrize("bandwidth", [0, -1.0, float("inf"), float("nan"), True])
def test_a_link_has_some_bandwidth(bandwidth: float) -> None:
    with pytest.raises(ConfigError, match="host_link_gb_per_s must be a finite number above 0"):
        EngineOptions(host_link_gb_per_s=bandwidth)


def test_a_machine_is_not_told_its_link() -> None:
    llm = pytest.importorskip("fastserve.llm")
    with pytest.raises(ConfigError, match=r"host_link_gb_per_s=16\.0: for simulations only.*leave it out"):
        llm.LLM("opt-125m", load_format="dummy", host_link_gb_per_s=16.0)


def host_tokens(profile: Profile, options: EngineOptions | None = None) -> int:
    cache = simulated_engine(profile, "fastserve-fcfs", {}, options).kv.config
    return cache.num_host_blocks * cache.block_size


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("a100-40g/opt-13b-tp1", 73_392),
        ("a100-40g/opt-66b-tp4", 101_936),
        ("a100-40g/opt-66b-tp2-pp2", 101_936),
        ("a100-40g/opt-175b-tp8-pp2", 203_888),
    ],
)
def test_every_gpu_swaps_to_56_gib_of_its_own(name: str, tokens: int) -> None:
    """The artifact's numbers: a model on more GPUs has more host memory."""
    assert host_tokens(load_profile(name)) == tokens


@pytest.mark.parametrize("gib", [0.5, 16, 32.0])
def test_the_swap_space_of_a_gpu_is_an_option(gib: float) -> None:
    profile = load_profile("a100-40g/opt-66b-tp4")
    tokens = host_tokens(profile, EngineOptions(swap_space_gib_per_gpu=gib))
    part = profile.kv_bytes_per_token / 4
    assert gib * 2**30 / part - 16 < tokens <= gib * 2**30 / part


def test_the_gpu_with_the_largest_part_is_full_first() -> None:
    model, profile = preset("opt-13b"), load_profile("a100-40g/opt-66b-tp2-pp2")
    parallel = ParallelConfig(1, 2, (10, 30))
    uneven = dataclasses.replace(
        profile,
        tensor_parallel_size=1,
        kv_bytes_per_token=model.kv_bytes_per_token(),
        largest_kv_bytes_per_token=parallel.rank_kv_bytes_per_token(model, "float16"),
    )
    assert host_tokens(uneven, EngineOptions(swap_space_gib_per_gpu=1)) == 2**30 * 4 // (3 * 819_200) // 16 * 16


def test_kv_heads_that_shards_share_are_on_each_of_them() -> None:
    model = dataclasses.replace(preset("llama-3-8b"), num_kv_heads=2)
    whole = model.kv_bytes_per_token("float16")
    assert [ParallelConfig(tp).rank_kv_bytes_per_token(model, "float16") for tp in (1, 2, 8)] == [
        whole,
        whole // 2,
        whole // 2,
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"swap_space_gib_per_gpu": 0}, "swap_space_gib_per_gpu must be a finite number above 0, got 0"),
        (
            {"swap_space_gib_per_gpu": 2.5, "num_host_blocks": 7},
            "num_host_blocks=7 and swap_space_gib_per_gpu=2.5 both say how large the host pool is; give one of them",
        ),
    ],
)
def test_a_swap_space_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineOptions(**options)


@pytest.mark.parametrize(("policy", "swap"), [("fastserve-fcfs", "reactive"), ("fastserve", "proactive")])
def test_every_transfer_takes_its_time_of_the_host(policy: str, swap: str) -> None:
    """Also those that start while the batch waits for them, as swap=reactive has it."""
    per_transfer_s, transfers, computed_s = 0.125, 0, 0.0

    class Counting(Observer):
        def on_transfer(self, finished: FinishedTransfer) -> None:
            nonlocal transfers
            transfers += 1

        def on_iteration(self, engine: EngineView, iteration: Iteration, start_s: float, end_s: float) -> None:
            nonlocal computed_s
            computed_s += end_s - start_s
            contexts = [r.num_computed_tokens + 1 for r in iteration.requests if r.is_decoding]
            prompts = [
                count
                for r, count in zip(iteration.requests, iteration.num_scheduled_tokens, strict=True)
                if not r.is_decoding
            ]
            computed_s -= PROFILE.latency.iteration_time(prompts, contexts)

    engine_time = EngineTime(per_transfer_s=per_transfer_s, source="fitted")
    slowed = dataclasses.replace(PROFILE, engine_time=engine_time)
    engine = simulated_engine(slowed, policy, {"swap": swap}, EngineOptions(num_gpu_blocks=24))
    engine.observer = Counting()
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    engine.run([Arrival(Request(name, 0.0, 100), params) for name in "abc"])
    assert transfers > 2
    assert computed_s == pytest.approx(per_transfer_s * transfers, rel=1e-6)

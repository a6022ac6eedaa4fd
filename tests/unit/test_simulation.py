"""What a simulation takes from its profile, and what the options replace."""

import dataclasses

import pytest

from fastserve.core.config import EngineOptions
from fastserve.core.errors import ConfigError
from fastserve.core.request import Request, SamplingParams
from fastserve.engine import Arrival, EngineView, FinishedTransfer, Observer
from fastserve.latency import EngineTime, load_profile
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

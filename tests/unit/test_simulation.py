"""What a simulation takes from its profile, and what the options replace."""

import dataclasses

import pytest

from fastserve.core.config import EngineOptions
from fastserve.core.errors import ConfigError
from fastserve.core.request import Request, SamplingParams
from fastserve.engine import Arrival, FinishedTransfer, Observer
from fastserve.latency import load_profile
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

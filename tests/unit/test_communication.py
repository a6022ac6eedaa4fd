"""Links and all-reduces: priced by message size, fitted to measured messages, kept in a profile, simulated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.config import EngineOptions
from fastserve.core.errors import ConfigError
from fastserve.core.request import Request, SamplingParams
from fastserve.engine import Arrival
from fastserve.latency import (
    AllReduce,
    DecodeFit,
    FittedLatency,
    HostLink,
    PipelinedLatency,
    PrefillCurve,
    PrefillFit,
    Profile,
    StageLink,
    all_reduces,
    fit_link,
    load_profile,
)
from fastserve.simulation import simulated_engine
from support.engines import LATENCY, STAGE_LINK
from support.watch import ms

LINE = FittedLatency(PrefillFit(0.011, 1.3e-4, 7e-9), (DecodeFit(0.009, 3e-7, 4e-5, 8), DecodeFit(0.008, 2e-7, 5e-5)))
CURVE = FittedLatency(PrefillCurve((1, 64, 72, 512), (0.004, 0.006, 0.009, 0.02), 2e-9), LINE.decode)
SUMS = AllReduce(0.001, 1e6, 100, (5, 4))


def profile_of(stage: FittedLatency, tp: int, pp: int, **more: Any) -> Profile:
    return replace(
        load_profile("a100-80g/opt-13b-tp1-swifttransformer"),
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        stage=stage,
        stage_link=more.pop("stage_link", STAGE_LINK) if pp > 1 else None,
        measured_range=None,
        kind=None,
        **more,
    )


def spans(
    profile: Profile, *requests: tuple[int, int], jumps: bool = True, **options: Any
) -> list[tuple[float, float]]:
    """Milliseconds of the iterations of a simulation in which these requests are there from the start."""
    engine = simulated_engine(profile, "fastserve-fcfs", {}, EngineOptions(**options))
    engine.jumps = jumps
    engine.run(
        Arrival(Request(str(i), 0.0, prompt), SamplingParams(max_tokens=output, ignore_eos=True))
        for i, (prompt, output) in enumerate(requests)
    )
    return [(ms(record.start_s), ms(record.end_s)) for record in engine.iterations]


# -- by message size ---------------------------------------------------------------------------------------------------


def test_all_reduces_of_a_stage_by_hand() -> None:
    # Two layers in each of two stages, and the embedding in the first.
    assert all_reduces((2, 2)) == SUMS.per_stage
    assert all_reduces((3,)) == (7,)
    # A message of n tokens takes 1 ms + 0.1 n. The first stage sums 5; the last 4, and gathers in one latency more.
    assert SUMS.of_stage(0) == pytest.approx((0.005, 0.0005))
    assert SUMS.of_stage(1) == pytest.approx((0.005, 0.0004))
    # One stage is the first and the last.
    assert AllReduce(0.001, 1e6, 100, (7,)).of_stage(0) == pytest.approx((0.008, 0.0007))


@given(
    stage=st.sampled_from([LINE, CURVE]),
    prompts=st.lists(st.integers(1, 700), max_size=4),
    contexts=st.lists(st.integers(1, 2048), max_size=12),
)
def test_what_is_added_is_paid_once_an_iteration_and_for_every_token(
    stage: FittedLatency, prompts: list[int], contexts: list[int]
) -> None:
    num_tokens = sum(prompts) + len(contexts)
    if num_tokens:
        expected = stage.iteration_time(prompts, contexts) + 0.003 + 2e-5 * num_tokens
        assert stage.plus(0.003, 2e-5).iteration_time(prompts, contexts) == pytest.approx(expected)


# -- fits --------------------------------------------------------------------------------------------------------------


def test_a_link_is_found_in_its_messages() -> None:
    latency_s, bandwidth = fit_link([(size, 20e-6 + size / 40e9) for size in (1e6, 4e6, 64e6)])
    assert (latency_s, bandwidth) == pytest.approx((20e-6, 40e9))
    # In the order of StageLink and AllReduce.
    assert StageLink(latency_s, bandwidth, 1024).transfer_time(1000) == pytest.approx(20e-6 + 1_024_000 / 40e9)


def test_a_fit_weighs_small_messages_as_much_as_large_ones() -> None:
    # 10 % more for the largest moves the latency little, though that is a thousandth of the error in seconds.
    points = [(size, 20e-6 + size / 1e9) for size in (1e3, 1e4, 1e5, 1e6, 1e7)]
    points[-1] = (1e7, 1.1 * points[-1][1])
    latency_s, bandwidth = fit_link(points)
    assert latency_s == pytest.approx(20e-6, rel=0.05)
    assert 0.9e9 < bandwidth < 1e9


def test_one_size_is_all_bandwidth_and_no_rise_is_all_latency() -> None:
    latency_s, bandwidth = fit_link([(1000, 1e-3), (1000, 2e-3), (1000, 1e-3)])
    assert (latency_s, bandwidth) == (0, pytest.approx(1e6))
    latency_s, bandwidth = fit_link([(1000, 1.1e-3), (2000, 1.0e-3), (4000, 0.9e-3)])
    assert 0.9e-3 < latency_s < 1.1e-3
    assert 4000 / bandwidth == pytest.approx(0.01 * latency_s)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "no message was measured"),
        ([(0, 1e-3)], "bytes of a measured message must be a finite number above 0, got 0"),
        ([(10, 1e-3), (20, float("nan"))], "seconds of a measured message must be a finite number above 0, got nan"),
    ],
)
def test_messages_that_say_nothing_are_refused(points: list[tuple[float, float]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_link(points)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HostLink(0.0, 0.0), r"host_link.bandwidth_bytes_per_s must be a finite number above 0, got 0.0"),
        (lambda: StageLink(-1.0, 1.0, 1), r"stage_link.latency_s must be a finite number of at least 0, got -1.0"),
        (lambda: StageLink(0.0, 1.0, 1, rendezvous=1), r"stage_link.rendezvous must be true or false, got 1"),  # type: ignore[arg-type]
        (lambda: replace(SUMS, latency_s=float("inf")), r"all_reduce.latency_s must be .* got inf"),
        (lambda: replace(SUMS, bandwidth_bytes_per_s=0.0), r"all_reduce.bandwidth_bytes_per_s must be .* got 0.0"),
        (lambda: replace(SUMS, bytes_per_token=0), r"all_reduce.bytes_per_token must be an integer .* got 0"),
        (lambda: replace(SUMS, per_stage=(4, 0)), r"all_reduce.per_stage\[1\] must be an integer .* got 0"),
        (lambda: replace(SUMS, per_stage=()), r"all_reduce.per_stage must have a number for each stage"),
        (lambda: profile_of(LINE, 1, 2, all_reduce=SUMS), r"all_reduce is given with tensor_parallel_size 1"),
        (lambda: profile_of(LINE, 2, 1, all_reduce=SUMS), r"per_stage=\(5, 4\) names 2 stages, .* is 1; give"),
        (lambda: profile_of(LINE, 1, 3, later_stages=(LINE,)), r"later_stages has 1 stages, .*_size 3; give 2"),
        (lambda: profile_of(LINE, 1, 1, later_stages=(LINE,)), r"later_stages has 1 stages, .*_size 1; give 0"),
    ],
)
def test_values_that_cannot_be_are_named(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# -- in a file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "profile",
    [
        profile_of(LINE, 2, 2, all_reduce=SUMS),
        profile_of(LINE, 1, 3, later_stages=(CURVE, LATENCY)),
        profile_of(CURVE, 4, 2, later_stages=(LINE,), all_reduce=SUMS),
        profile_of(LINE, 1, 2, stage_link=replace(STAGE_LINK, rendezvous=True)),
    ],
)
def test_a_file_gives_back_what_was_written(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    profile.save(path)
    read = load_profile(str(path))
    assert read == replace(profile, name=str(path).removesuffix(".json"))
    assert read.latency == profile.latency
    assert json.loads(path.read_text())["format_version"] == 4


def test_a_file_says_the_largest_part_of_a_cache_where_parts_differ(tmp_path: Path) -> None:
    profile = profile_of(LINE, 1, 2)
    equal = replace(profile, largest_kv_bytes_per_token=profile.kv_bytes_per_token // 2)
    assert equal == profile
    assert equal.to_json() == profile.to_json()
    uneven, path = replace(profile, largest_kv_bytes_per_token=600_000), tmp_path / "own.json"
    uneven.save(path)
    assert json.loads(path.read_text())["format_version"] == 6
    assert load_profile(str(path)).rank_kv_bytes_per_token == 600_000


def test_what_older_versions_can_say_is_written_so_that_they_can_read_it() -> None:
    two_stages = profile_of(LINE, 2, 2)
    assert two_stages.to_json()["format_version"] == 2
    assert set(two_stages.to_json()["stage_link"]) == {"latency_s", "bandwidth_bytes_per_s", "bytes_per_token"}
    assert not {"later_stages", "all_reduce"} & set(two_stages.to_json())
    assert profile_of(CURVE, 1, 1).to_json()["format_version"] == 3


@pytest.mark.parametrize(
    ("part", "wrong", "message"),
    [
        ("all_reduce", {"latency_s": 0.0}, "all_reduce\\.bandwidth_bytes_per_s is missing"),
        ("later_stages", [{"prefill": {}}], r"later_stages\[0\]\.prefill\.constant is missing"),
        ("later_stages", [{"prefill": {"constant": 0, "per_token": 0, "per_token_squared": 0}, "decode": []}],
         r"later_stages\[0\].decode must be a list with at least 1 entry, got \[\]"),
        ("format_version", 7, "format_version must be an integer of at most 6, got 7"),
        ("kv_cache", {"capacity_tokens": 64, "bytes_per_token": 100, "largest_bytes_per_token": 24},
         "kv_cache.largest_bytes_per_token is 24; the largest of 4 GPUs' parts of a token's 100 bytes is at least 25"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_is_refused(part: str, wrong: Any, message: str, tmp_path: Path) -> None:
    data = profile_of(LINE, 2, 2).to_json() | {part: wrong}
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=message):
        load_profile(str(tmp_path / "bad.json"))


# -- simulated, by hand ------------------------------------------------------------------------------------------------
# Of LATENCY a prompt takes 10 ms and 1 a token, a decode step 10; STAGE_LINK takes 1 ms and 0.1 a token.


def test_every_stage_takes_its_own_all_reduces() -> None:
    profile = profile_of(LATENCY, 2, 2, all_reduce=SUMS)
    # A prompt of 20: 30 + 5 * (1 + 2) ms, sent in 3, then 30 + 4 * (1 + 2) + 1. A token: 10 + 5.5, 1.1, 10 + 4.4 + 1.
    assert spans(profile, (20, 2)) == [(0, 91), (91, 123)]
    assert profile.latency.iteration_time([20], []) == pytest.approx(0.091)
    assert profile.latency.iteration_time([], [21]) == pytest.approx(0.032)


def test_one_stage_jumps_over_its_all_reduces_to_the_same_times() -> None:
    profile = profile_of(
        LINE, 2, 1, all_reduce=replace(SUMS, latency_s=1.7e-5, bandwidth_bytes_per_s=3e9, per_stage=(81,))
    )
    requests = ((20, 40), (300, 25), (7, 60))
    assert spans(profile, *requests, max_batch_size=2) == spans(profile, *requests, max_batch_size=2, jumps=False)


SLOW = FittedLatency(PrefillFit(0.005, 0.002, 0.0), (DecodeFit(0.025, 0.0, 0.0),))


def test_uneven_stages_hold_each_other_up() -> None:
    profile = profile_of(LATENCY, 1, 2, later_stages=(SLOW,))
    # a's prompt of 20: 30 ms, sent in 3, then 45 in the second. The first stage is free at 30, whatever the second
    # does: b's prompt of 5 takes it until 45, is there at 46.5 and waits until 78. With two in flight the next starts
    # when a's has ended: a's token from 78 is there at 89.1, and waits for b until 93; b's from 93 waits until 118.
    assert spans(profile, (20, 2), (5, 2), max_batch_size=1) == [(0, 78), (30, 93), (78, 118), (93, 143)]
    # The other way round the second stage waits: 45, 3, 30 and, beginning at 45, 15, 1.5, 15.
    swapped = profile_of(SLOW, 1, 2, later_stages=(LATENCY,))
    assert spans(swapped, (20, 1), (5, 1), max_batch_size=1) == [(0, 78), (45, 93)]
    for prompt in (20, 5):
        expected = 0.015 + 0.003 * prompt + 0.001 + 0.0001 * prompt
        assert profile.latency.iteration_time([prompt], []) == pytest.approx(expected)
        assert swapped.latency.iteration_time([prompt], []) == pytest.approx(expected)


def test_a_rendezvous_takes_the_time_of_who_receives() -> None:
    profile = profile_of(LATENCY, 1, 2, later_stages=(SLOW,), stage_link=replace(STAGE_LINK, rendezvous=True))
    # As above, but b's prompt, ready at 45, moves from 78 on in 1.5, then 15; a's token from 94.5 on, then 25; b's,
    # which began at 94.5, from 120.6 on.
    assert spans(profile, (20, 2), (5, 2), max_batch_size=1) == [(0, 78), (30, 94.5), (78, 120.6), (94.5, 146.7)]
    # Alone, nobody waits: the same as beside.
    assert spans(profile, (20, 3)) == spans(profile_of(LATENCY, 1, 2, later_stages=(SLOW,)), (20, 3))


@given(
    contexts=st.lists(st.integers(1, 2048), min_size=1, max_size=16),
    count=st.integers(1, 40),
    later=st.lists(st.sampled_from([LINE, CURVE, LATENCY, SLOW]), min_size=1, max_size=4),
)
def test_uneven_stages_foresee_their_decode_steps_to_the_bit(
    contexts: list[int], count: int, later: list[FittedLatency]
) -> None:
    latency = PipelinedLatency((LINE, *later), StageLink(17e-6, 8e9, 24_576))
    one_by_one = [latency.iteration_time((), [length + step for length in contexts]) for step in range(count)]
    assert latency.decode_times(contexts, count).tolist() == one_by_one

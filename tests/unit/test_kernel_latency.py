"""Times from kernel tables: exact where measured, linear between, and the same in every way they are asked for."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.errors import ConfigError
from fastserve.latency import (
    Curve,
    EngineTime,
    KernelLatency,
    KernelTables,
    MeasuredRange,
    decode_times,
    load_profile,
)
from fastserve.latency.with_engine_time import WithEngineTime

DENSE = Curve((1, 8, 64, 512, 4096), (0.010, 0.011, 0.012, 0.05, 0.5))
SEQUENCES = Curve((1, 64), (0.001, 0.002))
DECODE = (
    (1, Curve((16, 1024, 4096), (1e-4, 2e-4, 6e-4))),
    (8, Curve((16, 256, 1024), (1e-4, 3e-4, 1.1e-3))),
    (64, Curve((16, 256), (4e-4, 3e-3))),
)
"""Ragged: large batches were measured with short contexts only."""
PROMPTS = ((16, Curve((0, 512), (1e-4, 4e-4))), (512, Curve((0, 64, 512), (2e-3, 2.2e-3, 4e-3))))
MIXED = tuple(
    (chunk, prefix, decodes, Curve((16, 1024), (base, 3 * base)))
    for chunk, prefix, decodes, base in (
        (16, 0, 1, 2e-4), (16, 0, 8, 5e-4), (16, 512, 1, 5e-4), (16, 512, 8, 9e-4),
        (512, 0, 1, 2.5e-3), (512, 0, 8, 3e-3), (512, 64, 1, 2.6e-3), (512, 64, 8, 3.3e-3), (512, 512, 8, 5e-3),
    )
)  # fmt: skip
TABLES = KernelTables(
    dense=DENSE, per_sequence=SEQUENCES, decode=DECODE, prompts=PROMPTS, prompts_by_length=False, mixed=MIXED
)
LATENCY = KernelLatency(TABLES)
BY_LENGTH = KernelLatency(
    replace(
        TABLES,
        prompts=((1, Curve((16, 512), (1e-4, 2e-3))), (4, Curve((16, 512), (2e-4, 7e-3)))),
        prompts_by_length=True,
        mixed=(),
    )
)

lengths = st.integers(1, 6000)
contexts_of = st.lists(lengths, min_size=1, max_size=100)


def beside_attention(num_tokens: int, num_sequences: int) -> float:
    return float(np.interp(num_tokens, DENSE.at, DENSE.seconds)) + float(
        np.interp(num_sequences, SEQUENCES.at, SEQUENCES.seconds)
    )


@pytest.mark.parametrize(
    ("decodes", "context", "seconds"),
    [(n, x, s) for n, curve in DECODE for x, s in zip(curve.at, curve.seconds, strict=True)],
)
def test_decode_is_exact_where_it_was_measured(decodes: int, context: int, seconds: float) -> None:
    found = LATENCY.iteration_time([], [context] * decodes)
    assert found == pytest.approx(beside_attention(decodes, decodes) + seconds, rel=1e-12)


@pytest.mark.parametrize(
    ("chunk", "prefix", "seconds"),
    [(n, x, s) for n, curve in PROMPTS for x, s in zip(curve.at, curve.seconds, strict=True)],
)
def test_a_chunk_is_exact_where_it_was_measured(chunk: int, prefix: int, seconds: float) -> None:
    found = LATENCY.iteration_time([chunk], [], [prefix])
    assert found == pytest.approx(beside_attention(chunk, 1) + seconds, rel=1e-12)


@pytest.mark.parametrize(
    "point", [(*row[:3], x, s) for row in MIXED for x, s in zip(row[3].at, row[3].seconds, strict=True)]
)
def test_an_iteration_of_both_is_exact_where_it_was_measured(point: tuple[int, int, int, int, float]) -> None:
    chunk, prefix, decodes, context, seconds = point
    found = LATENCY.iteration_time([chunk], [context] * decodes, [prefix])
    assert found == pytest.approx(beside_attention(chunk + decodes, 1 + decodes) + seconds, rel=1e-12)


def test_between_measured_points_times_are_linear() -> None:
    halfway = [LATENCY.iteration_time([chunk], [520] * 8, [0]) for chunk in (16, 264, 512)]
    attention = [time - beside_attention(n + 8, 9) for time, n in zip(halfway, (16, 264, 512), strict=True)]
    assert attention[1] == pytest.approx((attention[0] + attention[2]) / 2)
    # A prefix between two measured ones, and numbers of decodes between two measured ones.
    assert LATENCY.iteration_time([16], [16], [256]) - beside_attention(17, 2) == pytest.approx(3.5e-4)
    assert LATENCY.iteration_time([], [16] * 36) - beside_attention(36, 36) == pytest.approx(2.5e-4)


@given(st.integers(1, 100), lengths, lengths)
def test_decodes_take_longer_the_longer_their_context(batch: int, context: int, more: int) -> None:
    assert LATENCY.iteration_time([], [context] * batch) <= LATENCY.iteration_time([], [context + more] * batch) + 1e-12


@given(st.integers(1, 700), st.integers(0, 900), st.integers(0, 900))
def test_a_chunk_takes_longer_the_longer_its_prefix(chunk: int, prefix: int, more: int) -> None:
    times = [
        latency.iteration_time([chunk], [], [p]) for latency in (LATENCY, BY_LENGTH) for p in (prefix, prefix + more)
    ]
    assert times[0] <= times[1] + 1e-12
    assert times[2] <= times[3] + 1e-12


@given(contexts_of, st.integers(1, 40), st.sampled_from([0.0, 0.05]), st.booleans())
def test_decode_times_are_those_of_single_iterations_to_the_bit(
    contexts: list[int], count: int, unequal: float, with_engine: bool
) -> None:
    latency: KernelLatency | WithEngineTime = KernelLatency(replace(TABLES, unequal_contexts=unequal))
    if with_engine:
        latency = WithEngineTime(latency, EngineTime(1e-3, 7e-6, 3e-7, source="fitted"))
    one_by_one = [latency.iteration_time([], [length + step for length in contexts]) for step in range(count)]
    assert decode_times(latency, contexts, count).tolist() == one_by_one


def test_unequal_contexts_cost_their_measured_share() -> None:
    contexts = [100] * 4 + [900] * 4
    equal, longest = LATENCY.iteration_time([], [500] * 8), LATENCY.iteration_time([], [900] * 8)
    assert LATENCY.iteration_time([], contexts) == pytest.approx(equal)
    unequal = KernelLatency(replace(TABLES, unequal_contexts=0.25)).iteration_time([], contexts)
    assert unequal == pytest.approx(equal + 0.25 * (longest - equal))


@pytest.mark.parametrize("latency", [LATENCY, BY_LENGTH])
def test_a_batch_takes_as_long_as_its_longest_context_alone(latency: KernelLatency) -> None:
    alone = latency.iteration_time([], [400_000]) - beside_attention(1, 1)
    assert latency.iteration_time([], [1] * 63 + [400_000]) - beside_attention(64, 64) >= alone


def test_several_chunks_add_what_they_take_above_the_shortest_kernel() -> None:
    two = LATENCY.iteration_time([512, 16], [], [0, 512])
    assert two == pytest.approx(beside_attention(528, 2) + 2e-3 + (4e-4 - 1e-4))


def test_prompts_by_length_are_priced_by_attended_pairs_and_added_to_decodes() -> None:
    assert BY_LENGTH.iteration_time([512] * 4, []) == pytest.approx(beside_attention(2048, 4) + 7e-3)
    whole, first = BY_LENGTH.iteration_time([512], []), BY_LENGTH.iteration_time([256], [])
    second = BY_LENGTH.iteration_time([256], [], [256])
    attention = [time - beside_attention(n, 1) for time, n in ((whole, 512), (first, 256), (second, 256))]
    assert attention[1] < attention[2] < attention[0]
    both = BY_LENGTH.iteration_time([512], [16] * 8)
    assert both == pytest.approx(beside_attention(520, 9) + 2e-3 + 1e-4)


def test_an_engines_own_time_is_added_by_iteration_request_and_token() -> None:
    timed = WithEngineTime(LATENCY, EngineTime(1e-3, 1e-5, 1e-6, source="measured"))
    assert timed.iteration_time([16], [16] * 3) == pytest.approx(
        LATENCY.iteration_time([16], [16] * 3) + 1e-3 + 4e-5 + 19e-6
    )
    assert timed.iteration_time([], []) == 0 == LATENCY.iteration_time([], [])


def test_the_range_is_read_from_the_axes() -> None:
    assert TABLES.range == MeasuredRange(iteration_tokens=4096, prompt_tokens=1024, decodes=64, context_tokens=4096)
    assert BY_LENGTH.tables.range.prompt_tokens == 512


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Curve((), ()), "at least one"),
        (lambda: Curve((1, 2), (0.1,)), "2 points and 1 seconds"),
        (lambda: Curve((2, 2), (0.1, 0.2)), "must ascend, got 2 after 2"),
        (lambda: Curve((1, 2), (0.1, float("nan"))), "time at 2 is nan"),
        (lambda: replace(TABLES, decode=()), "without decode"),
        (lambda: replace(TABLES, prompts=PROMPTS[::-1]), "prompts must ascend, got 16 after 512"),
        (lambda: replace(TABLES, prompts_by_length=True), "not by length"),
        (lambda: replace(TABLES, unequal_contexts=2.0), "from 0 to 1, got 2.0"),
        (lambda: EngineTime(per_request_s=-1.0), "engine_time.per_request_s"),
        (lambda: MeasuredRange(decodes=0), "range.decodes"),
    ],
)
def test_tables_that_cannot_be_are_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_a_profile_of_kernels_is_read_as_it_was_written(tmp_path: Path) -> None:
    base = load_profile("a100-40g/opt-13b-tp1")
    profile = replace(
        base,
        name=str(tmp_path / "kernels"),
        stage=LATENCY,
        engine_time=EngineTime(1e-3, per_transfer_s=2e-5, source="fitted"),
        measured_range=MeasuredRange(decodes=64),
        kind="measured kernels",
        known_error="3 % on another run",
    )
    path = tmp_path / "kernels.json"
    profile.save(path)
    assert json.loads(path.read_text())["format_version"] == 5
    read = load_profile(str(path))
    assert read == profile
    assert read.latency.iteration_time([16], [16]) == profile.latency.iteration_time([16], [16])
    two = replace(
        profile,
        pipeline_parallel_size=2,
        later_stages=(BY_LENGTH,),
        stage_link=load_profile("a100-40g/opt-66b-tp2-pp2").stage_link,
    )
    two.save(path)
    assert load_profile(str(path)) == two


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("kernels"), "neither of coefficients and kernels"),
        (lambda data: data["kernels"]["dense"].update(seconds=[0.1]), "5 points and 1 seconds"),
        (lambda data: data["kernels"].update(dens=1), "kernels has an unknown key 'dens'"),
        (lambda data: data["kernels"].pop("dense"), "kernels.dense is missing"),
        (lambda data: data.update(kind="guessed"), "kind must be"),
        (lambda data: data.update(engine_time={"per_step_s": 1.0}), "engine_time has an unknown key 'per_step_s'"),
        (lambda data: data.update(range={"decodes": 0}), "range.decodes"),
        (lambda data: data["kernels"]["dense"].update(seconds=[10.0, 11.0, 12.0, 50.0, 500.0]), "a time is in seconds"),
    ],
)
def test_a_file_of_kernels_that_cannot_be_names_its_fault(change: object, message: str, tmp_path: Path) -> None:
    profile = replace(load_profile("a100-40g/opt-13b-tp1"), stage=LATENCY)
    path = tmp_path / "bad.json"
    profile.save(path)
    data = json.loads(path.read_text())
    change(data)  # type: ignore[operator]
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=message):
        load_profile(str(path))

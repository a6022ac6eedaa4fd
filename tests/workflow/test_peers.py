"""benchmarks/peers.py: the request file, what each script makes of it, and the comparison. No peer is needed.

The peers' answers were recorded from sched-sim 0.2.1 and AISimulate 0.13.0.dev202610270000000085, which gave the same.
"""

import csv
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import _peer_aisimulate, _peer_sched_sim
from benchmarks.peers import CASES, OURS, Case, MooncakeLike, Simulator, compare, write_requests
from fastserve.core.errors import ConfigError
from harness.workload.workload import Workload

REQUESTS = """prompt_tokens,output_tokens,arrival_s
20,4,0.0
9,2,0.0
12,6,0.0078125
8,3,0.0205078125
8,4,0.25
8,2,0.25
"""
CASE = Case("small", "", ("trace", None), 6, max_batch_size=8, token_budget=8)
ITERATION_S = 1 / 128
RECORDED = {
    "first_token_s": [end * ITERATION_S for end in (3, 5, 9, 11, 33, 37)],
    "finished_s": [end * ITERATION_S for end in (9, 7, 15, 13, 38, 38)],
}


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "requests.csv"
    path.write_text(REQUESTS)
    return path


def ours(script: str = OURS) -> Simulator:
    return Simulator("ours", Path(sys.executable), script, {}, {})


def test_the_request_file_is_exact_in_binary(tmp_path: Path) -> None:
    workload = Workload(np.array([0.1, 1.9999, 2.0]), np.array([7, 8, 9]), np.array([1, 2, 300]), "", 0)
    write_requests(workload, tmp_path / "requests.csv")
    with (tmp_path / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["arrival_s"]) for row in rows] == [102 / 1024, 2047 / 1024, 2.0]
    assert [(row["prompt_tokens"], row["output_tokens"]) for row in rows] == [("7", "2"), ("8", "2"), ("9", "300")]


def test_each_peer_gets_its_own_units(requests: Path) -> None:
    *_, fourth, _, _ = _peer_sched_sim.convert(requests)
    # The iteration that ends a prompt is no token there.
    assert fourth == {"request_id": "3", "arrived_at": 0.0205078125, "prompt_tokens": 8, "output_tokens": 2}
    *_, fourth, _, _ = _peer_aisimulate.convert(requests)
    assert fourth == {
        "id": "3", "arrival_time_ms": 20.5078125, "input_tokens": 8, "output_tokens": 3, "metadata": None,
    }  # fmt: skip


def test_aisimulate_gets_the_limits_of_the_case(requests: Path) -> None:
    settings = {
        "max_batch_size": 8, "token_budget": 512, "num_gpu_blocks": 100, "block_size": 16, "prefill_s": ITERATION_S,
        "decode_s": ITERATION_S, "times": False,
    }  # fmt: skip
    content = _peer_aisimulate.specification(_peer_aisimulate.convert(requests), settings)
    rank = content["engine"]["rank"]
    assert (rank["max_num_seqs"], rank["max_num_batched_tokens"]) == (8, 512)
    assert (rank["num_gpu_blocks"], rank["block_size"]) == (100, 16)
    assert rank["timing_model"] == {"type": "fixed", "prefill_ms": 7.8125, "decode_ms": 7.8125}
    assert len(content["requests"]) == 6


def test_our_schedule_is_the_peers_but_for_the_price_of_a_last_token(requests: Path) -> None:
    priced_as_theirs = ours().run(CASE, requests, times=True, one_token_chunks_as_prompts=True)
    assert compare(priced_as_theirs, RECORDED).is_complete
    agreement = compare(ours().run(CASE, requests, times=True), RECORDED)
    # The last request's chunks are of 7 tokens and of 1, and the second runs beside a decode step.
    assert (agreement.equal, agreement.largest_s, agreement.request) == ((5, 4), ITERATION_S, 5)


def test_a_comparison_counts_what_is_equal_what_is_close_and_what_is_missing() -> None:
    own = {"first_token_s": [1.0, 2.0, 3.0], "finished_s": [4.0, 5.0, 6.0]}
    other = {"first_token_s": [1.0, 2.0 + 1e-12, 3.5], "finished_s": [4.0, None, 6.0]}
    agreement = compare(own, other)
    assert (agreement.requests, agreement.equal, agreement.close) == (3, (1, 2), (2, 2))
    assert math.isinf(agreement.largest_s)
    assert agreement.request == 1
    assert not agreement.is_complete
    assert compare(own, own).is_complete
    assert "3 of 3 first tokens equal" in str(compare(own, own))


@pytest.mark.parametrize("script", ["_peer_sched_sim.py", "_peer_aisimulate.py"])
def test_a_script_without_its_package_says_which_is_missing(requests: Path, script: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)ours ended with status 1 on 'small'.*No module named '{script[6:-3]}'"):
        ours(script).run(CASE, requests, times=True)


def test_invented_lengths_have_mooncakes_means() -> None:
    prompts, outputs = MooncakeLike().sample(20_000, np.random.default_rng(0))
    assert prompts.mean() == pytest.approx(12_035, rel=0.05)
    assert outputs.mean() == pytest.approx(343, rel=0.05)
    assert len(CASES[-1].workload()) == 12_000

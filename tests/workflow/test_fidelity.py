import itertools
import json
import threading
import time

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from fastserve.core.clock import WallClock
from fastserve.core.config import ModelConfig
from fastserve.core.errors import ConfigError
from fastserve.latency import DecodeFit, FittedLatency, PrefillFit, load_profile
from fastserve.latency.fitting import fit, measure, with_overhead
from fastserve.runtime.models import build_model, shared_models
from harness.analysis.pairs import pairs_of, worst_runs_first
from harness.report.captions import agreement_caption
from harness.studies.fidelity import METRICS, measure_fidelity
from harness.studies.fidelity.turns import take_turns

POLICIES = ("fastserve-fcfs", "vllm", "fastserve")


def experiment(**run):
    settings = {"max_batch_size": 2, "block_size": 8, "num_gpu_blocks": 12, "num_host_blocks": 64}
    trace = "zipf:min=4,max=24"
    return {
        "seeds": [0],
        "least_processor_share": 0,  # Tests run beside others.
        "run": {"model": "opt-tiny", "load_format": "dummy", "trace": trace, "torch_threads": 1, "settings": settings}
        | run,
        "series": [{"name": policy, "label": policy.upper(), "policy": policy} for policy in POLICIES],
        "points": [{"load": 1.5, "num_requests": 10}],
    }


def test_the_table_is_complete_and_follows_from_the_files(tmp_path):
    table = measure_fidelity(experiment(), tmp_path)
    pd.testing.assert_frame_equal(table, pd.read_csv(tmp_path / "points.csv"))
    assert list(table["policy"]) == list(POLICIES)
    assert list(table["label"]) == [policy.upper() for policy in POLICIES]
    assert set(table["load"]) == {1.5}
    assert table["rate"].nunique() == 1  # the same workload for all
    assert not table.isna().any(axis=None)
    digests = set()
    for row in table.to_dict("records"):
        real, sim = (
            json.loads((tmp_path / row[f"{kind}_run"] / "summary.json").read_text()) for kind in ("real", "sim")
        )
        assert (real["backend"], sim["backend"]) == ("engine", "sim")
        assert real["finished"] == sim["finished"] == 10
        for metric in METRICS:
            assert row[f"real_{metric}"] == real[metric]
            assert row[f"sim_{metric}"] == sim[metric]
            assert row[f"error_{metric}"] == pytest.approx(sim[metric] / real[metric] - 1)
        for kind in ("real", "sim"):
            meta = json.loads((tmp_path / row[f"{kind}_run"] / "meta.json").read_text())
            digests.add(meta["trace"]["digest"])
            sizes = meta["configuration"]["engine"]
            assert (sizes["num_gpu_blocks"], sizes["num_host_blocks"], sizes["block_size"]) == (12, 64, 8)
        profile = json.loads((tmp_path / "runs" / row["series"] / "load-1.5" / "profile.json").read_text())
        assert profile["provenance"]["overhead_s"] > 0
        assert 0 < profile["provenance"]["processor_share"] == row["processor_share"] <= 1
        assert len(profile["coefficients"]["decode"]) == 2  # one for each batch size
    assert len(digests) == 1

    pairs = pd.read_csv(tmp_path / "pairs.csv")
    assert len(pairs) == len(POLICIES) * len(METRICS)
    assert set(zip(pairs["series"], pairs["load"], pairs["seed"], pairs["metric"], strict=True)) == set(
        itertools.product(POLICIES, [1.5], [0], METRICS)
    )
    assert pairs["error"].abs().is_monotonic_decreasing
    for pair in pairs.to_dict("records"):
        run = table[table["series"] == pair["series"]].iloc[0]
        for kind in ("real", "sim", "error"):
            assert pair[kind] == pytest.approx(run[f"{kind}_{pair['metric']}"])
        assert pair["within"] == (abs(pair["error"]) <= 0.1)


def runs(*errors):
    """A table of runs with these errors of mean and P95 completion time; a None is a run without a value."""
    table = pd.DataFrame({"series": list("abcdef")[: len(errors)], "load": 0.5, "seed": 3})
    table = table.assign(label=table["series"].str.upper())
    for i, metric in enumerate(("mean_jct_s", "p95_jct_s")):
        table[f"real_{metric}"] = 2.0
        table[f"error_{metric}"] = [each[i] for each in errors]
        table[f"sim_{metric}"] = 2.0 * (1 + table[f"error_{metric}"].astype(float))
    return table


def test_every_pair_is_in_the_table_the_worst_first():
    table = runs((0.09, -0.1), (-0.11, 0.0), (0.03, 0.42))
    pairs = pairs_of(table)
    assert pairs["error"].tolist() == [0.42, -0.11, -0.1, 0.09, 0.03, 0.0]
    assert pairs["series"].tolist() == ["c", "b", "a", "a", "c", "b"]
    assert pairs["within"].tolist() == [False, False, True, True, True, True]
    assert worst_runs_first(table)["series"].tolist() == ["c", "b", "a"]
    assert agreement_caption(pairs) == (
        "Worst pair: C, load 0.5, seed 3, P95 completion time: +42.0%. 4 of 6 pairs (each metric of each run) are "
        "within 10%; the median error is 9.5%."
    )


def test_a_run_without_a_value_agrees_with_nothing_and_comes_first():
    table = runs((0.5, 0.0), (None, 0.0))
    pairs = pairs_of(table)
    assert (pairs.loc[0, "series"], pairs.loc[0, "within"]) == ("b", False)
    assert worst_runs_first(table)["series"].tolist() == ["b", "a"]
    assert "B, load 0.5, seed 3, mean completion time: no value in one of the two. 2 of 4 " in agreement_caption(pairs)


@given(st.lists(st.tuples(*[st.floats(-0.99, 5)] * 2), min_size=1, max_size=6))
def test_no_pair_is_lost_or_averaged(errors):
    pairs = pairs_of(runs(*errors))
    assert sorted(pairs["error"]) == sorted(itertools.chain(*errors))
    assert pairs["error"].abs().is_monotonic_decreasing
    assert f"{sum(abs(error) <= 0.1 for error in itertools.chain(*errors))} of {2 * len(errors)} pairs" in (
        agreement_caption(pairs)
    )


def test_an_architecture_is_a_model_of_its_own(tmp_path):
    architecture = {
        "architectures": ["OPTForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 32,
        "max_position_embeddings": 64,
    }
    config = experiment(model=None) | {"architecture": architecture}
    config["series"] = config["series"][:1]
    config["points"] = [{"load": 1, "num_requests": 4}]
    assert measure_fidelity(config, tmp_path)["num_requests"].tolist() == [4]
    assert json.loads((tmp_path / "model/config.json").read_text()) == architecture


def test_several_ranks_take_turns_as_well(tmp_path):
    config = experiment() | {"points": [{"load": 1.5, "num_requests": 6}]}
    config["series"] = [
        {"name": "stages", "label": "2 stages", "policy": "fastserve-fcfs", "run": {"pipeline_parallel_size": 2}},
        {"name": "shards", "label": "2 shards", "policy": "fastserve", "run": {"tensor_parallel_size": 2}},
    ]
    table = measure_fidelity(config, tmp_path)
    assert table["series"].tolist() == ["stages", "shards"]
    assert table["processor_share"].between(0, 1).all()
    for row, shape in zip(table.to_dict("records"), ((1, 2), (2, 1)), strict=True):
        assert row["real_mean_jct_s"] > 0
        assert row["sim_mean_jct_s"] > 0
        folder = tmp_path / row["real_run"]
        assert json.loads((folder / "summary.json").read_text())["finished"] == 6
        profile = load_profile(str(folder.parent / "profile.json"))
        assert (profile.tensor_parallel_size, profile.pipeline_parallel_size) == shape
        assert len(profile.stages) == shape[1]
        assert profile.provenance["channel_s"] > 0
        assert (profile.stage_link is not None) == (shape[1] > 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [0, 1]}, r"one seed, got \[0, 1\]"),
        ({"run": {"model": "opt-tiny"}}, "set num_gpu_blocks and num_host_blocks"),
        ({"points": [{"load": 0, "num_requests": 4}]}, "load must be a finite number above 0, got 0"),
        ({"run": {}}, "needs run.model or an architecture"),
    ],
)
def test_bad_input_is_named(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        measure_fidelity(experiment() | change, tmp_path)


def test_jobs_take_turns_and_none_runs_beside_another():
    order, lock = [], threading.Lock()

    def job(name):
        def work(turn):
            for _ in range(3):
                assert lock.acquire(blocking=False)
                order.append(name)
                lock.release()
                turn.yield_turn()

        return work

    take_turns([job(name) for name in "abcd"], job("x"), 1.0)
    assert (
        "".join(order) == "axbcdx" * 3
    )  # The companion closes each round, and is cancelled when the others have ended.


def test_a_job_that_fails_ends_all():
    def fails(turn):
        turn.yield_turn()
        raise ValueError("broken")

    def goes_on(turn):
        while True:
            turn.yield_turn()

    with pytest.raises(ValueError, match="broken"):
        take_turns([goes_on, fails], goes_on, 1.0)


def test_a_stopped_clock_stands_still_for_every_thread():
    clock = WallClock()
    began = time.perf_counter()
    before = clock.now()
    seen = []
    with clock.stopped():
        at = clock.now()
        thread = threading.Thread(target=lambda: seen.append(clock.now()))
        thread.start()
        thread.join()
        time.sleep(0.05)
        assert clock.now() == at == seen[0]
    after = clock.now()
    assert before <= at <= after
    assert after - before <= time.perf_counter() - began - 0.05


def test_a_machine_whose_batches_differ_is_recovered_batch_by_batch():
    # A batch of two costs half as much again as one, a batch of three hardly more than two.
    decode = (DecodeFit(1.0, 0.002, 0.0, 1), DecodeFit(1.5, 0.002, 0.0, 2), DecodeFit(1.6, 0.001, 0.0))
    truth = FittedLatency(PrefillFit(1.2, 0.02, 0.0), decode)
    shapes = [((n,), ()) for n in (4, 16, 64)] + [((), (n,) * size) for size in (1, 2, 3) for n in (8, 40, 90)]
    fitted = fit(measure(truth.iteration_time, shapes, repeats=1), by_batch_size=True)
    for size in (1, 2, 3):
        contexts = [20 + size] * size
        assert fitted.iteration_time([], contexts) == pytest.approx(truth.iteration_time([], contexts))
    slower = with_overhead(fitted, 0.25)
    for prompts, contexts in (([10], []), ([], [5, 6]), ([10], [5])):
        expected = fitted.iteration_time(prompts, contexts) + 0.25
        assert slower.iteration_time(prompts, contexts) == pytest.approx(expected)


def test_models_are_shared_within_and_only_within():
    import torch

    def build(name, seed):
        sizes = {"vocab_size": 32, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4}
        config = ModelConfig(name=name, architecture="opt", intermediate_size=16, max_model_len=16, **sizes)
        return build_model(config, torch.float32, "cpu", seed)

    with shared_models():
        first = build("a", 0)
        assert build("a", 0) is first
        assert build("a", 1) is not first
        assert build("b", 0) is not first
    assert build("a", 0) is not build("a", 0)

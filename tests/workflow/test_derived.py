import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastserve.core.errors import NothingFinishedError
from fastserve.latency import load_profile
from harness.analysis.derived import NUM_DECILES, SETTLED, derived_metrics, times_alone
from harness.run.config import RunConfig
from harness.run.runner import run

PROFILE = "a100-80g/opt-13b-tp1-swifttransformer"


def serve(tmp_path, **changes):
    defaults = {"profile": PROFILE, "policy": "fastserve-fcfs", "trace": "sharegpt", "num_requests": 30, "rate": 2.0}
    config = RunConfig(**defaults | changes)
    summary = run(config, tmp_path)
    return summary, derived_metrics(pq.read_table(tmp_path / "requests.parquet"), load_profile(config.profile).latency)


def test_one_request_alone_is_not_slowed_down(tmp_path):
    for trace in ("fixed:prompt=100,output=1", "fixed:prompt=64,output=33"):
        _, metrics = serve(tmp_path, trace=trace, num_requests=1, rate=1.0)
        assert metrics["mean_slowdown"] == pytest.approx(1)
        assert metrics["max_slowdown"] == pytest.approx(1)
        assert metrics["mean_queueing_s"] == pytest.approx(0, abs=1e-9)


def test_times_alone_are_those_of_a_run(tmp_path):
    latency = load_profile(PROFILE).latency
    summary, _ = serve(tmp_path, trace="fixed:prompt=200,output=50", num_requests=1, rate=1.0)
    (alone,) = times_alone(latency, np.array([200]), np.array([50]))
    assert summary["mean_jct_s"] == pytest.approx(alone)


def test_the_parts_add_up_and_the_deciles_average_to_the_mean(tmp_path):
    summary, metrics = serve(tmp_path, num_requests=100)
    parts = sum(metrics[f"mean_{part}_s"] for part in ("queueing", "swapping", "execution"))
    assert parts == pytest.approx(summary["mean_jct_s"])
    deciles = [metrics[f"slowdown_decile_{i}"] for i in range(1, NUM_DECILES + 1)]
    assert sum(deciles) / NUM_DECILES == pytest.approx(metrics["mean_slowdown"])
    assert 1 <= metrics["p50_slowdown"] <= metrics["p99_slowdown"] <= metrics["max_slowdown"]


def test_attainment_counts_failed_requests_as_missed(tmp_path):
    settings = {"max_model_len": 400}
    summary, metrics = serve(tmp_path, num_requests=100, rate=0.1, settings=settings)
    assert summary["failed"]
    assert metrics["slo_attainment_2"] <= summary["finished"] / 100
    assert metrics["slo_attainment_0.5"] <= metrics["slo_attainment_1"] <= metrics["slo_attainment_2"]


def test_without_a_latency_model_there_is_no_slowdown(tmp_path):
    run(RunConfig(profile=PROFILE, num_requests=5, rate=1.0), tmp_path)
    metrics = derived_metrics(pq.read_table(tmp_path / "requests.parquet"), None)
    assert metrics["mean_slowdown"] is None
    assert metrics["slowdown_decile_1"] is None
    assert metrics["mean_execution_s"] > 0


SETTLED_METRICS = {
    "mean_normalized_latency_settled_s", "p95_normalized_latency_settled_s", "mean_jct_settled_s",
    "p99_slowdown_settled", "max_slowdown_settled",
}  # fmt: skip


def test_settled_are_those_who_arrived_after_enough_had_finished(tmp_path):
    """The first so many take a second each; then one that waits from before, three that do not, and one that fails."""
    arrival = [*np.arange(SETTLED), SETTLED - 0.5, *(SETTLED + np.arange(1.0, 4.0)), SETTLED + 4.0]
    jct = np.array([*np.ones(SETTLED), 900, 20, 30, 40, np.nan])
    columns = {
        "status": ["finished"] * (len(jct) - 1) + ["failed"],
        "arrival_s": arrival,
        "first_token_s": arrival + jct,
        "finished_s": arrival + jct,
        "prompt_tokens": [10] * len(jct),
        "output_tokens": [10] * len(jct),
        **dict.fromkeys(("queueing_s", "swapping_s", "execution_s"), jct),
    }
    pq.write_table(pa.table(columns), tmp_path / "requests.parquet")
    latency = load_profile(PROFILE).latency
    metrics = derived_metrics(pq.read_table(tmp_path / "requests.parquet"), latency)
    (alone,) = times_alone(latency, np.array([10]), np.array([10]))
    assert metrics["settled_requests"] == 3
    assert metrics["mean_jct_settled_s"] == pytest.approx(30)
    assert metrics["mean_normalized_latency_settled_s"] == pytest.approx(3)
    assert metrics["p95_normalized_latency_settled_s"] == pytest.approx(3.9)
    assert metrics["max_slowdown_settled"] == pytest.approx(40 / alone)
    assert metrics["p99_slowdown_settled"] == pytest.approx(39.8 / alone)
    without = derived_metrics(pq.read_table(tmp_path / "requests.parquet"), None)
    assert without["mean_jct_settled_s"] == pytest.approx(30)
    assert without["max_slowdown_settled"] is None


def test_in_a_short_run_nobody_is_settled(tmp_path):
    _, metrics = serve(tmp_path)
    assert metrics["settled_requests"] == 0
    assert {metrics[name] for name in SETTLED_METRICS} == {None}


def test_a_run_in_which_nothing_finished_has_no_times(tmp_path):
    with pytest.raises(NothingFinishedError):
        serve(tmp_path, num_requests=3, settings={"max_model_len": 2})
    metrics = derived_metrics(pq.read_table(tmp_path / "requests.parquet"), load_profile(PROFILE).latency)
    assert metrics["mean_slowdown"] is None
    assert metrics["slo_attainment_1"] == 0

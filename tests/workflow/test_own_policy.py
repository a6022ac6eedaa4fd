"""The experiments on `gittins`: their loads are what they say, and a few of the findings hold on a small scale."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from harness.experiments.folder import read_experiments
from harness.experiments.points import points_of
from harness.run.config import RunConfig
from harness.run.runner import run
from harness.studies.simulations import service_rate

LOADED = ("own-policy", "own-policy-steady", "own-policy-bounds", "own-policy-raised", "own-policy-raised-bounds")
EXPERIMENTS = read_experiments(Path(__file__).parents[2] / "workflows/config/experiments")


@pytest.mark.parametrize("panel", [panel.name for panel in EXPERIMENTS["own-policy"].panels])
def test_loads_are_shares_of_the_rate_that_fcfs_serves(panel: str, tmp_path: Path) -> None:
    points = [point for name in LOADED for point in points_of(EXPERIMENTS[name]) if point.panel == panel]
    config = points[0].config
    fcfs = replace(config, policy="fastserve-fcfs", arrivals="poisson", settings={}, history=None, history_requests=0)
    served = statistics.median(service_rate(replace(fcfs, seed=seed), 400, tmp_path / f"{seed}") for seed in range(3))
    for point in points:
        assert point.config.rate == pytest.approx(float(point.x) * served, rel=0.01)


def test_what_it_has_learned_before_helps_where_prompts_tell_the_answer(tmp_path: Path) -> None:
    def mean_jct_s(policy: str, history_requests: int = 0) -> float:
        config = RunConfig(
            policy=policy,
            backend="sim",
            profile="a100-80g/opt-13b-tp1-swifttransformer",
            trace="azure-conv",
            rate=2.58,
            num_requests=200,
            history="same" if history_requests else None,
            history_requests=history_requests,
        )
        return run(config, tmp_path / f"{policy}-{history_requests}")["mean_jct_s"]

    cold, warm, fastserve = mean_jct_s("gittins"), mean_jct_s("gittins", 3000), mean_jct_s("fastserve")
    assert warm < cold < fastserve

"""The fit of an engine's own time: that it finds a known one, and that what is shipped is of the shipped profiles."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from fastserve.core.errors import ConfigError
from fastserve.latency import load_profile
from fastserve.latency.engine_time import EngineTime
from harness.analysis.points import load_reported
from harness.experiments.experiment import Experiment
from harness.experiments.folder import read_experiments
from harness.run.config import RunConfig
from harness.run.runner import run
from harness.studies.engine_time import (
    DELTA,
    MeasuredPoint,
    Simulations,
    base_profile,
    fit_engine_time,
    huber,
    mean_normalized_latency,
    measured_points,
    search,
)
from tools import fit_engine_time as tool
from tools import make_profiles

ROOT = Path(__file__).parents[2]
PROFILE = "a100-40g/opt-13b-tp1"


def configs(rate: float, max_batch_size: int, num_requests: int = 40) -> tuple[RunConfig, ...]:
    return tuple(
        RunConfig(
            policy="fastserve-fcfs",
            trace="alpaca",
            rate=rate,
            num_requests=num_requests,
            seed=seed,
            profile=PROFILE,
            settings={"max_batch_size": max_batch_size},
        )
        for seed in (0, 1)
    )


def test_the_fit_finds_the_time_with_which_the_points_were_made() -> None:
    profile, truth = load_profile(PROFILE), EngineTime(0.005, 0.0003, source="fitted")
    own = replace(profile, engine_time=truth)
    points = []
    for max_batch_size in (4, 16):
        for rate in (1.0, 6.0, 12.0):
            runs = configs(rate, max_batch_size)
            seconds = sum(mean_normalized_latency(config, own) for config in runs) / len(runs)
            points.append(MeasuredPoint(f"cap {max_batch_size}", runs, seconds))
    fit = fit_engine_time(points, Simulations(profile))
    assert fit.engine_time.per_iteration_s == pytest.approx(truth.per_iteration_s, abs=2.5e-4)
    assert fit.engine_time.per_request_s == pytest.approx(truth.per_request_s, abs=2e-5)
    assert fit.engine_time.source == "fitted"
    assert fit.rms < 0.01
    assert Simulations(profile).loss(points, EngineTime()) > 100 * fit.loss


def test_the_search_follows_a_valley_that_lies_aslant() -> None:
    """Time an iteration and time a request that fit nearly as well: along one line the loss hardly rises."""

    def loss(time: EngineTime) -> float:
        across = time.per_iteration_s + 12 * time.per_request_s - 0.0086
        along = time.per_iteration_s - 0.0055
        return 10 * across**2 + along**2

    found = search(loss)
    assert found.per_iteration_s == pytest.approx(0.0055, abs=3e-4)
    assert found.per_request_s == pytest.approx(0.0031 / 12, abs=3e-5)


def test_a_steep_point_weighs_no_more_than_its_error() -> None:
    assert huber(-0.1) == pytest.approx(0.005)
    assert huber(DELTA) == pytest.approx(DELTA**2 / 2)
    assert huber(2.0) - huber(1.9) == pytest.approx(0.1 * DELTA)


def test_a_simulation_for_the_fit_is_that_of_a_run(tmp_path: Path) -> None:
    config = configs(6.0, 16)[0]
    summary = run(config, tmp_path / "run")
    assert mean_normalized_latency(config, load_profile(PROFILE)) == pytest.approx(
        summary["mean_normalized_latency_s"], rel=1e-12
    )


def experiments() -> dict[str, Experiment]:
    return {
        name: read_experiments(ROOT / "workflows/config/experiments")[name]
        for name in ("artifact-rerun", "artifact-rerun-kernels")
    }


def test_the_points_that_are_fitted_are_those_of_the_artifacts_scripts() -> None:
    experiment = experiments()["artifact-rerun-kernels"]
    reported = load_reported(*(ROOT / "workflows/data" / name for name in tool.TABLES), experiment)
    points = measured_points(experiment, "fastserve-fcfs", reported)
    rates = {panel: [p.configs[0].rate for p in points if p.panel == panel] for panel in ("batch-16", "batch-64")}
    # 2.581, where the frame of the plot cuts the curve, was not run.
    assert rates == {"batch-16": [0.1, 0.2, 0.5, 1, 1.5, 1.75, 2, 2.25, 2.5], "batch-64": [1, 2.5, 2.75, 3]}
    assert next(p.seconds_per_token for p in points if p.panel == "batch-64" and p.configs[0].rate == 3) == 0.2285
    with pytest.raises(ConfigError, match="an engine's own time is fitted on one profile, not on a100-40g/llama"):
        base_profile(points)
    nothing = reported[reported["source"] == "paper"]
    with pytest.raises(ConfigError, match=r"series 'fastserve-fcfs' of .* has no rate that the rerun has"):
        measured_points(experiment, "fastserve-fcfs", nothing)


def test_both_experiments_differ_in_the_engines_time_alone() -> None:
    with_time, without = (experiments()[name] for name in ("artifact-rerun", "artifact-rerun-kernels"))
    policies = {series.name: (series.policy, series.run) for series in with_time.series}
    assert {series.name: (series.policy, series.run) for series in without.series}.items() <= policies.items()
    assert {"fastserve-fcfs", "fastserve"} <= {series.name for series in without.series}
    assert without.panels == with_time.panels
    assert with_time.run.profile_prefix == "artifact-"
    assert without.run.profile_prefix == ""


def test_the_shipped_profiles_are_the_base_with_the_fitted_time_and_the_fit_is_of_that_base() -> None:
    record = json.loads(make_profiles.ENGINE_TIME.read_text(encoding="utf-8"))
    for profile in make_profiles.artifact_profiles():
        shipped = load_profile(profile.name)
        base = load_profile(profile.name.removeprefix("artifact-"))
        assert shipped.stage == base.stage
        assert shipped.engine_time == profile.engine_time == EngineTime(**record["engine_time"])
        assert shipped.engine_time.source == "fitted"
        assert shipped.kv_capacity_tokens == base.kv_capacity_tokens
        assert "rerun" in shipped.provenance["engine_time"]
    fitted_on = load_profile(record["profile"])
    assert record["profile_digest"] == tool.digest_of(fitted_on), "run python tools/fit_engine_time.py"


def test_the_recorded_fit_is_what_simulations_give() -> None:
    record = json.loads(make_profiles.ENGINE_TIME.read_text(encoding="utf-8"))
    points = tool.points_to_fit()
    assert {seed for point in points for seed in (config.seed for config in point.configs)} == set(
        record["fitted_to"]["seeds"]
    )
    fitted = EngineTime(**record["engine_time"])
    simulations = Simulations(load_profile(record["profile"]))
    errors = [simulations.error(point, fitted) for point in points]
    assert math.sqrt(sum(error**2 for error in errors) / len(errors)) == pytest.approx(
        record["rms_log_error"], abs=1e-3
    )
    least = simulations.loss(points, fitted)
    for share in (0.5, 1.5):
        other = replace(
            fitted, per_iteration_s=share * fitted.per_iteration_s, per_request_s=share * fitted.per_request_s
        )
        assert simulations.loss(points, other) > 1.1 * least


def test_the_recorded_fits_with_other_lengths_are_what_simulations_give() -> None:
    record = json.loads(make_profiles.ENGINE_TIME.read_text(encoding="utf-8"))
    fits = record[tool.OTHER_LENGTHS]
    assert set(fits) == {
        "sharegpt-client:filter=or",
        "sharegpt-client:share=0.45",
        "sharegpt-client:share=0.45,filter=or",
    }
    simulations = Simulations(load_profile(record["profile"]))
    for trace, (iteration_ms, request_ms, rms) in fits.items():
        time = EngineTime(iteration_ms / 1e3, request_ms / 1e3, source="fitted")
        errors = [simulations.error(point, time) for point in tool.points_to_fit(trace)]
        assert math.sqrt(sum(error**2 for error in errors) / len(errors)) == pytest.approx(rms, abs=1e-3)

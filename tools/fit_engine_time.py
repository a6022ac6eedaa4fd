"""Fit the own time of the artifact's engine to its authors' rerun, and write the profiles that carry it.

    python tools/fit_engine_time.py            fit, write workflows/data/artifact_engine_time.json and the profiles
    python tools/fit_engine_time.py --check    fit, print, and write nothing
    python tools/fit_engine_time.py --trace T  fit with other lengths, and add the times to the file; no profile changes
    python tools/fit_engine_time.py --transfers   FastServe's loads too, were each transfer to take the host time

Run it again when the profiles of `a100-40g` change: the fit rests on them. It takes three to four minutes. Only
FastServe-FCFS of OPT-13B on ShareGPT is fitted, at batch caps of 16, 64 and 128; docs/reproduction.md judges the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import make_profiles
import numpy as np

from fastserve.core.errors import ConfigError
from fastserve.latency.engine_time import EngineTime
from fastserve.latency.profile import Profile
from harness.analysis.capacity import capacity_of
from harness.analysis.files import write_json
from harness.analysis.points import load_reported
from harness.experiments.experiment import Experiment
from harness.experiments.files import parse_as, read_yaml
from harness.experiments.folder import linked
from harness.experiments.points import points_of
from harness.run.config import RunConfig
from harness.studies.engine_time import (
    Fit,
    MeasuredPoint,
    Simulations,
    base_profile,
    fit_engine_time,
    mean_normalized_latency,
    measured_points,
)

ROOT = Path(__file__).resolve().parents[1]
SOURCE, EXPERIMENT = "artifact-rerun", "artifact-rerun-kernels"
"""The second takes its points from the first, with profiles that have no engine time."""
TABLES = ("reported_points.csv", "artifact_rerun_points.csv")
SERIES = "fastserve-fcfs"
FITTED = ("batch-16", "batch-64", "batch-128")
"""Panels whose points are fitted: with one batch cap alone, time an iteration and time a request look alike."""
PREDICTED_TRANSFERS_S = (0.0, 1e-3, 3e-3)
PREDICTED_PANELS, PREDICTED_SERIES = ("batch-16", "batch-64"), ("fastserve", "fastserve-artifact")
RESTS_ON = ("coefficients", "kernels", "kv_cache", "host_link")
"""Keys of a profile's file that a fit rests on."""
OTHER_LENGTHS = "with_other_lengths"
"""Key of the fits with other lengths, which show how lengths and own time make up for each other."""
SEEDS = (0, 1, 2)
TRANSFER_TIMES_S = (0.0, 1e-3, 2e-3, 5e-3, 10e-3)
"""Seconds a transfer for which the loss is shown, to see whether the points say anything of it."""


def experiment_of(name: str) -> Experiment:
    """One of both experiments: not the whole folder, which is checked against profiles that are yet to be written."""
    folder = ROOT / "workflows/config/experiments"
    contents = linked({each: read_yaml(folder / f"{each}.yaml") for each in (SOURCE, EXPERIMENT)})
    return parse_as(Experiment, contents[name], folder / f"{name}.yaml")


def points_to_fit(trace: str | None = None) -> list[MeasuredPoint]:
    """The measured points of FastServe-FCFS, to be simulated with the experiment's lengths or those of `trace`."""
    experiment = experiment_of(EXPERIMENT)
    reported = load_reported(*(ROOT / "workflows/data" / name for name in TABLES), experiment)
    points = [point for point in measured_points(experiment, SERIES, reported) if point.panel in FITTED]
    return [replace(point, configs=tuple(_changed(point.configs, trace))) for point in points]


def _changed(configs: Sequence[RunConfig], trace: str | None) -> Iterator[RunConfig]:
    """The runs with a seed of the fit, with other lengths if they are given."""
    for config in configs:
        if config.seed in SEEDS:
            yield config if trace is None else replace(config, trace=trace)


def digest_of(profile: Profile) -> str:
    """SHA-256 of the iteration times and the cache that a fit rests on, the first 12 digits."""
    content = {key: value for key, value in profile.to_json().items() if key in RESTS_ON}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def record_of(fit: Fit, points: Sequence[MeasuredPoint], profile: Profile, others: Sequence[Fit]) -> dict[str, Any]:
    """What is shipped: the times, what they were fitted to, and how well; and the fits with other lengths so far."""
    digest = digest_of(profile)
    earlier = json.loads(make_profiles.ENGINE_TIME.read_text(encoding="utf-8"))
    return {
        "engine_time": asdict(fit.engine_time),
        "profile": profile.name,
        "profile_digest": digest,
        "fitted_to": {
            "measurement": "FastServe-FCFS of the authors' rerun (artifact_rerun_points.csv)",
            "points": {panel: sum(point.panel == panel for point in points) for panel in FITTED},
            "traces": sorted({config.trace for point in points for config in point.configs}),
            "seeds": SEEDS,
        },
        "rms_log_error": round(fit.rms, 4),
        "without_one_panel": {panel: milliseconds(each) for panel, each in zip(FITTED, others, strict=True)},
        OTHER_LENGTHS: earlier[OTHER_LENGTHS] if earlier["profile_digest"] == digest else {},
    }


def milliseconds(fit: Fit) -> list[float]:
    """The fitted times: ms an iteration, ms a request."""
    return [round(1e3 * time, 4) for time in (fit.engine_time.per_iteration_s, fit.engine_time.per_request_s)]


def record_with_other_lengths(trace: str, fit: Fit, profile: Profile) -> dict[str, Any]:
    """What is shipped, and in it the times that other lengths need: ms an iteration, ms a request, error in log."""
    record: dict[str, Any] = json.loads(make_profiles.ENGINE_TIME.read_text(encoding="utf-8"))
    if record["profile_digest"] != digest_of(profile):
        raise ConfigError(
            f"{make_profiles.ENGINE_TIME}: the fit in it is of another {profile.name}; fit without --trace first"
        )
    return record | {OTHER_LENGTHS: record[OTHER_LENGTHS] | {trace: [*milliseconds(fit), round(fit.rms, 4)]}}


def tables(fit: Fit, points: Sequence[MeasuredPoint], simulations: Simulations) -> list[str]:
    """The fit for a reader: error of each point, and the loss over the time of a transfer."""
    lines = ["| panel | rate | measured (s/token) | simulated |", "|---|---|---|---|"]
    for point, error in fit.errors.items():
        measured = point.seconds_per_token
        lines.append(f"| {point.panel} | {point.configs[0].rate:g} | {measured:.3f} | {measured * np.exp(error):.3f} |")
    lines += ["", "| seconds a transfer | loss |", "|---|---|"]
    for seconds in TRANSFER_TIMES_S:
        loss = simulations.loss(points, replace(fit.engine_time, per_transfer_s=seconds))
        lines.append(f"| {seconds:g} | {loss:.5f} |")
    return lines


def transfers_table(profile: Profile, engine_time: EngineTime) -> list[str]:
    """Markdown: loads of FastServe's policies over the host's time for a transfer, which is not fitted."""
    experiment = experiment_of(SOURCE)
    lines = [f"| policy, panel | {' | '.join(f'{1e3 * each:g} ms' for each in PREDICTED_TRANSFERS_S)} |"]
    lines.append("|---|" + "---|" * len(PREDICTED_TRANSFERS_S))
    for panel in PREDICTED_PANELS:
        for series in PREDICTED_SERIES:
            runs: dict[float, list[RunConfig]] = {}
            for point in points_of(experiment):
                rate = point.config.rate
                if (point.panel, point.series) == (panel, series) and rate is not None and point.config.seed in SEEDS:
                    runs.setdefault(rate, []).append(point.config)
            cells = []
            for seconds in PREDICTED_TRANSFERS_S:
                used = replace(profile, engine_time=replace(engine_time, per_transfer_s=seconds))
                means = [
                    np.mean([mean_normalized_latency(each, used) for each in configs]) for configs in runs.values()
                ]
                load, note = capacity_of(list(runs), means, float(experiment.slo_of(panel) or 0))
                cells.append(f"{load:.3g}" if load else note)
            lines.append(f"| {series}, {panel} | {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument(
        "--trace", help="request lengths, as for `fastbench run`, in place of the experiment's; changes no profile"
    )
    parser.add_argument("--transfers", action="store_true", help="show FastServe's loads by a transfer's time")
    given = parser.parse_args(arguments)
    points = points_to_fit(given.trace)
    profile = base_profile(points)
    simulations = Simulations(profile)
    fit = fit_engine_time(points, simulations)
    if given.trace:
        record = record_with_other_lengths(given.trace, fit, profile)
    else:
        others = [fit_engine_time([point for point in points if point.panel != panel], simulations) for panel in FITTED]
        record = record_of(fit, points, profile, others)
    print("\n".join([json.dumps(record, indent=2), "", *tables(fit, points, simulations)]))
    if given.transfers:
        print("\n".join(["", *transfers_table(profile, fit.engine_time)]))
    if given.check:
        return
    write_json(record, make_profiles.ENGINE_TIME)
    if not given.trace:
        make_profiles.write_artifact_profiles()


if __name__ == "__main__":
    main()

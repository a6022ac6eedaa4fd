"""The fidelity study: carry out the real runs in turns with the profiler, simulate them, and write the table."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from harness.analysis.files import write_csv
from harness.run.runner import run
from harness.studies.fidelity.bench import make_bench
from harness.studies.fidelity.comparison import Pair
from harness.studies.fidelity.experiment import FidelityExperiment, series_config
from harness.studies.fidelity.profiler import Profiler, warm_up
from harness.studies.fidelity.turns import Turn, take_turns
from harness.studies.simulations import service_rate, simulated

TURN_S = 0.03
"""Computing time of a turn: short against the machine's drift, long against the cold caches that it begins with."""
TURN_OF_RANKS_S = 0.1
"""The same for several ranks: their iterations are longer, and ranks that were stopped need time to resume."""


def measure_fidelity(config: Mapping[str, Any], out: Path) -> pd.DataFrame:
    """Carry out the experiment, write `out`/points.csv and the files behind it, and return the table.

    `config` is an experiment: `run` (a partial RunConfig of the engine, with all sizes of the cache), `series` (name,
    label, policy, run), `points` (load, num_requests), `seeds` (one), and `architecture` unless the model is a preset:
    the content of a config.json in Hugging Face format. A series' `run` may set the layout of ranks; the steps below
    are done for each layout.

    1. Warm up: run every number of tokens that an iteration can have once. Measure a first profile, `out`/profile.json.
    2. For each policy, measure the engine's own time between two iterations.
    3. A load is a share of the service rate: the rate at which the simulator, with the first policy and the first
       profile, completes the point's requests if all arrive together.
    4. The real runs and the profiler take turns. `out`/runs/NAME/load-L/profile.json is what the profiler measured
       until that run ended, with the policy's own time added to every iteration; `real` and `sim` are the runs.

    Column `processor_share` is the part of the profiler's time in which it had a processor. On a machine that does
    nothing else it is 1, and only then is the comparison fair.

    Raises ConfigError for bad input.
    """
    # Its default, 1024 kernels, is fewer than one for each matrix and number of tokens. Read when torch first computes.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    experiment = FidelityExperiment.of(config, out)
    from fastserve.runtime.models import shared_models  # Imports torch.

    pairs: list[Pair] = []
    with shared_models():
        for of_layout in experiment.by_layout():
            pairs += _measure(of_layout, out)
    for pair in pairs:
        run(simulated(pair.config, pair.folder / "profile.json"), pair.folder / "sim")
    table = pd.DataFrame([pair.row() for pair in pairs])
    write_csv(table, out / "points.csv")
    return table


def _measure(experiment: FidelityExperiment, out: Path) -> list[Pair]:
    """Steps 1 to 4 for one layout of ranks: everything that takes real time."""
    from fastserve.runtime.worker.probe import StageProbe  # Imports torch.

    folder = out / experiment.folder_name
    folder.mkdir(parents=True, exist_ok=True)
    first_profile = folder / "profile.json"
    config = replace(experiment.config, profile=str(first_profile))
    with closing(make_bench(experiment.config)) as bench:
        profiler = Profiler(experiment.config, experiment.shapes, bench)
        profiler.warm_up(experiment.longest_iteration)
        profiler.measure_all(repeats=3)
        profiler.profile(0.0).save(first_profile)

        overhead_s = {
            series["name"]: bench.overhead(
                series_config(config, series), profiler.profile(0.0), folder / "calibration" / series["name"]
            )
            for series in experiment.series
        }
        pairs = list(_pairs(replace(experiment, config=config), first_profile, out))

        def measure_real(pair: Pair, turn: Turn) -> None:
            with bench.start_clone() as ranks:
                if ranks is not None:
                    turn.paused = ranks.frozen
                    warm_up(StageProbe(ranks).stage_times, experiment.longest_iteration)
                run(pair.config, pair.folder / "real", observer=turn, ranks=ranks)
            profiler.profile(overhead_s[pair.series["name"]]).save(pair.folder / "profile.json")

        profiler.forget()
        length_s = TURN_S if experiment.layout.world_size == 1 else TURN_OF_RANKS_S
        take_turns([partial(measure_real, pair) for pair in pairs], profiler.measure_in_turns, length_s)
    return pairs


def _pairs(experiment: FidelityExperiment, first_profile: Path, out: Path) -> Iterator[Pair]:
    """Every series at every load, with the rates that the loads are."""
    for point in experiment.points:
        rate = service_rate(
            simulated(series_config(experiment.config, experiment.series[0]), first_profile),
            point["num_requests"],
            first_profile.parent / "calibration" / "service-rate",
        )
        for series in experiment.series:
            config = replace(
                series_config(experiment.config, series),
                rate=float(f"{point['load'] * rate:.3g}"),
                num_requests=point["num_requests"],
            )
            folder = out / "runs" / series["name"] / f"load-{point['load']:g}"
            yield Pair(series, point["load"], config, folder)

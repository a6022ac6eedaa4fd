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
from harness.analysis.pairs import pairs_of
from harness.run.runner import run
from harness.studies.fidelity.bench import make_bench
from harness.studies.fidelity.comparison import Pair
from harness.studies.fidelity.experiment import FidelityExperiment, series_config
from harness.studies.fidelity.profiler import Profiler, warm_up
from harness.studies.fidelity.turns import Turn, take_turns
from harness.studies.processors import LEAST_SHARE, Watch, available_processors, check_share, require_processors
from harness.studies.simulations import service_rate, simulated

TURN_S = 0.03
"""Computing time of a turn: short against the machine's drift, long against the cold caches that it begins with."""
TURN_OF_RANKS_S = 0.1
"""The same for several ranks: their iterations are longer, and ranks that were stopped need time to resume."""


def measure_fidelity(config: Mapping[str, Any], out: Path) -> pd.DataFrame:
    """Carry out the experiment, write `out`/points.csv, `out`/pairs.csv and the files behind them; return the first.

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

    A row of points.csv is a run, and a row of pairs.csv one metric of one run, the worst first. Column
    `processor_share` is the share of the processors that other programs left, at its lowest until that run ended.

    The comparison is fair only on a machine that does nothing else. So the processors are probed before, and watched
    while it lasts; the tables are written only if at least `least_processor_share` of them was left all the time. A
    processor for each rank and one for the rest of the machine are needed, or all, where there are fewer.

    Raises ConfigError for bad input, BusyMachineError on a machine that is too busy.
    """
    # Its default, 1024 kernels, is fewer than one for each matrix and number of tokens. Read when torch first computes.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    experiment = FidelityExperiment.of(config, out)
    from fastserve.runtime.models import shared_models  # Imports torch.

    least_share = config.get("least_processor_share", LEAST_SHARE)
    layouts = list(experiment.by_layout())
    if least_share:
        require_processors(max(map(_needed_processors, layouts)), least_share)
    pairs: list[Pair] = []
    with shared_models():
        for of_layout in layouts:
            pairs += _measure(of_layout, out, Watch(_needed_processors(of_layout), least_share))
    for pair in pairs:
        run(simulated(pair.config, pair.folder / "profile.json"), pair.folder / "sim")
    table = pd.DataFrame([pair.row() for pair in pairs])
    write_csv(pairs_of(table), out / "pairs.csv")
    write_csv(table, out / "points.csv")
    return table


def _needed_processors(experiment: FidelityExperiment) -> int:
    """A processor for each rank, and one for the system and for the engine of several ranks."""
    return min(available_processors(), experiment.layout.world_size + 1)


def _measure(experiment: FidelityExperiment, out: Path, watch: Watch) -> list[Pair]:
    """Steps 1 to 4 for one layout of ranks: everything that takes real time."""
    from fastserve.runtime.worker.probe import StageProbe  # Imports torch.

    folder = out / experiment.folder_name
    folder.mkdir(parents=True, exist_ok=True)
    first_profile = folder / "profile.json"
    config = replace(experiment.config, profile=str(first_profile))
    with closing(make_bench(experiment.config)) as bench:
        profiler = Profiler(experiment.config, experiment.shapes, bench, watch)
        profiler.warm_up(experiment.longest_iteration)
        profiler.measure_all(repeats=3)
        profiler.profile(0.0).save(first_profile)

        overhead_s = {
            series["name"]: bench.overhead(
                series_config(config, series), profiler.profile(0.0), folder / "calibration" / series["name"]
            )
            for series in experiment.series
        }
        watch.look_now()
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
        watch.look_now()
        check_share(profiler.processor_share, watch.needed, watch.least_share, "in the turns of the measurement")
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

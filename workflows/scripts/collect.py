"""Snakemake job: one table of an experiment's points."""

from pathlib import Path
from typing import TYPE_CHECKING

from joblog import logged

from harness.analysis.files import read_json, write_csv
from harness.analysis.points import points_table
from harness.experiments.experiment import Experiment

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    results = {}
    for batch in snakemake.input.batches:
        results |= read_json(Path(batch))
    experiment = Experiment.model_validate(snakemake.params.experiment)
    points = points_table(snakemake.wildcards.experiment, experiment, results)
    write_csv(points, Path(snakemake.output[0]))
    seconds = sum(results[Path(run).name]["seconds"] for run in points["run"].unique())
    print(f"wrote {snakemake.output[0]}: {len(points)} points, whose runs took {seconds:.0f} s")

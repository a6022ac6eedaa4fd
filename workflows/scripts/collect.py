"""Snakemake job: one table of an experiment's points, and the commits and machines of their runs."""

from pathlib import Path
from typing import TYPE_CHECKING

from joblog import logged

from harness.analysis.files import write_csv, write_json
from harness.analysis.points import points_table
from harness.experiments.experiment import Experiment
from harness.pipeline.batch import read_batches

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    results = read_batches(map(Path, snakemake.input.batches))
    experiment = Experiment.model_validate(snakemake.params.experiment)
    points = points_table(snakemake.wildcards.experiment, experiment, results)
    write_csv(points, Path(snakemake.output.points))
    runs = [results[run] for run in points["run"].unique()]
    made_by = [{key: run["meta"][key] for key in ("commit", "core", "hardware")} for run in runs]
    write_json(list({str(each): each for each in made_by}.values()), Path(snakemake.output.provenance))
    seconds = sum(run["seconds"] for run in runs)
    print(f"wrote {snakemake.output.points}: {len(points)} points, whose runs took {seconds:.0f} s")

"""Snakemake job: an experiment's targets, and whether its points meet them."""

from pathlib import Path
from typing import TYPE_CHECKING

from joblog import logged

from harness.analysis.files import read_table, write_csv
from harness.analysis.targets import targets_table
from harness.experiments.experiment import Experiment

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    experiment = Experiment.model_validate(snakemake.params.experiment)
    table = targets_table(experiment, read_table(Path(snakemake.input.points)))
    write_csv(table, Path(snakemake.output[0]))
    shown = table[["claim", "value", "low", "high", "at_most", "met", "where"]]
    print(shown.to_string(index=False, na_rep="-", float_format="{:.3g}".format))
    print(f"wrote {snakemake.output[0]}")

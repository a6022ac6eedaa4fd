"""Snakemake job: the load of each series over another's, in all panels of an experiment."""

from pathlib import Path
from typing import TYPE_CHECKING

from joblog import logged

from harness.analysis.comparisons import comparisons_table
from harness.analysis.files import read_table, write_csv
from harness.analysis.points import load_reported
from harness.experiments.experiment import Experiment

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    experiment = Experiment.model_validate(snakemake.params.experiment)
    reported = load_reported(Path(snakemake.input.reported), Path(snakemake.input.rerun), experiment)
    table = comparisons_table(experiment, read_table(Path(snakemake.input.points)), reported)
    write_csv(table, Path(snakemake.output[0]))
    shown = table[["panel", "label", "ratio", "low", "high", "over_load", "paper_ratio", "rerun_ratio", "note"]]
    print(shown.to_string(index=False, na_rep="-", float_format="{:.2f}".format))
    print(f"wrote {snakemake.output[0]}")

"""Snakemake job: the highest load each series carries within the SLO, beside the paper's."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from joblog import logged

from harness.points import capacity_table, load_reported, write_csv

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    experiment = snakemake.params.experiment
    reported = load_reported(Path(snakemake.input.reported), experiment["paper"])
    points = pd.read_csv(snakemake.input.points)
    table = capacity_table(snakemake.wildcards.experiment, experiment, points, reported)
    write_csv(table, Path(snakemake.output[0]))
    shown = table[["label", "capacity", "paper_capacity", "relative_difference", "note"]]
    print(shown.to_string(index=False, na_rep="-"))
    print(f"wrote {snakemake.output[0]}")

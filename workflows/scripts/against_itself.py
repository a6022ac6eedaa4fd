"""Snakemake job: each series against itself, with other seeds: how often the intervals show a difference."""

from pathlib import Path
from typing import TYPE_CHECKING

from joblog import logged

from harness.analysis.against_itself import against_itself_table, shares
from harness.analysis.files import read_table, write_csv
from harness.experiments.experiment import Experiment

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    experiments = {
        path.parent.name: (Experiment.model_validate(snakemake.params.experiments[path.parent.name]), read_table(path))
        for path in map(Path, snakemake.input.points)
    }
    table = against_itself_table(experiments)
    write_csv(table, Path(snakemake.output[0]))
    print(shares(table).to_string(index=False, float_format="{:.3f}".format))
    print(f"wrote {snakemake.output[0]}")

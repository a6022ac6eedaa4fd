"""Snakemake job: one table of an experiment's points."""

from pathlib import Path
from typing import TYPE_CHECKING

from joblog import logged

from harness.points import load_points, write_csv

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    out = Path(snakemake.output[0])
    points = load_points(snakemake.wildcards.experiment, snakemake.params.experiment, out.parent)
    write_csv(points, out)
    print(f"wrote {out}: {len(points)} points")

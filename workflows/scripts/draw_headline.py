"""Snakemake job: the claims of the paper, or of its loads, beside ours, with intervals and verdicts."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from joblog import logged

from harness.report.plots import draw_headline

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    table = pd.read_csv(snakemake.input.table)
    for path in draw_headline(table, Path(snakemake.output.png).with_suffix(""), snakemake.params.loads):
        print(f"wrote {path}")

"""Snakemake job: every claim's value over the paper's, with its interval and verdict."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from joblog import logged

from harness.report.plots import draw_headline

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    for path in draw_headline(pd.read_csv(snakemake.input.table), Path(snakemake.output.png).with_suffix("")):
        print(f"wrote {path}")

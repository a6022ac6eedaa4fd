"""Snakemake job: the figure of an experiment, as PNG and PDF."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from joblog import logged

from harness.plots import draw
from harness.points import load_reported, provenance

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    experiment = snakemake.params.experiment
    reported = load_reported(Path(snakemake.input.reported), experiment["paper"])
    points = pd.read_csv(snakemake.input.points)
    metas = provenance(Path(path).parent for path in snakemake.input.meta)
    for path in draw(experiment, points, reported, metas, Path(snakemake.output.png).with_suffix("")):
        print(f"wrote {path}")

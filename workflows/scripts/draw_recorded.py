"""Snakemake job: a figure of recorded runs, as PNG and PDF."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from joblog import logged

from harness.analysis.files import provenance
from harness.report.captions import recorded_caption
from harness.report.plots import draw_recorded

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

TITLES = {
    "latency": "Measured on {}: mean normalized latency over load",
    "agreement": "The simulator against what was measured on {}",
}

with logged(snakemake.log[0]):
    table = pd.read_csv(snakemake.input.points)
    metas = provenance(Path(run) for run in table["real_run"])
    hardware = metas[0]["hardware"]
    title = TITLES[snakemake.wildcards.view].format(hardware.get("gpu", hardware["cpu"]))
    stem = Path(snakemake.output.png).with_suffix("")
    for path in draw_recorded(snakemake.wildcards.view, table, title, recorded_caption(table, metas), stem):
        print(f"wrote {path}")

"""Snakemake job: the figures of measured runs, as PNG and PDF."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from joblog import logged

from harness.analysis.files import read_json, read_table
from harness.experiments.experiment import Experiment
from harness.report.captions import truth_caption, would_have_caption
from harness.report.plots import draw_page
from harness.report.plots.measured import draw_policies, draw_truth

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    experiment = Experiment.model_validate(snakemake.params.experiment)
    metas = read_json(Path(snakemake.input.provenance))
    points = read_table(Path(snakemake.input.points))
    errors, requests, occupancy, replays, policies = (
        pd.read_csv(snakemake.input[name], keep_default_na=name != "policies")
        for name in ("errors", "requests", "occupancy", "replays", "policies")
    )
    title = "Simulated: what each policy would have done with the same requests on these GPUs"
    for make_page, caption, png in (
        (
            partial(draw_truth, errors, requests, occupancy, replays, experiment.title),
            truth_caption(experiment, metas, points),
            snakemake.output.truth,
        ),
        (
            partial(draw_policies, policies, title),
            would_have_caption(experiment, metas, points),
            snakemake.output.policies,
        ),
    ):
        for path in draw_page(make_page, caption, Path(png).with_suffix("")):
            print(f"wrote {path}")

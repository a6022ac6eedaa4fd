"""Snakemake job: the figure of an experiment, as PNG and PDF."""

from pathlib import Path
from typing import TYPE_CHECKING

from joblog import logged

from harness.analysis.files import provenance, read_json, read_table
from harness.analysis.pairs import pairs_of
from harness.analysis.points import load_reported
from harness.experiments.experiment import Experiment
from harness.report.captions import agreement_caption, provenance_caption
from harness.report.plots import draw, flags_of

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    experiment = Experiment.model_validate(snakemake.params.experiment)
    points = read_table(Path(snakemake.input.points))
    capacity = read_table(Path(snakemake.input.capacity)) if snakemake.input.get("capacity") else None
    reported = load_reported(Path(snakemake.input.reported), Path(snakemake.input.rerun), experiment)
    if snakemake.input.get("provenance"):  # Of batches; other experiments leave a folder for each run.
        metas = read_json(Path(snakemake.input.provenance))
    else:
        metas = provenance(Path(run) for run in points["real_run" if "real_run" in points else "run"].unique())
    caption = provenance_caption(experiment, metas, points)
    if experiment.figure == "fidelity":
        caption = f"{agreement_caption(pairs_of(points))} {caption}"
    drawn = experiment.model_dump()
    flags = flags_of(drawn, points, capacity)
    for path in draw(drawn, points, capacity, reported, caption, flags, Path(snakemake.output.png).with_suffix("")):
        print(f"wrote {path}")

"""Snakemake job: the pages of docs with the fresh numbers, and whether the committed pages have the same."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from joblog import logged

from fastserve.core.files import atomic_write
from harness.experiments.experiment import Experiment
from harness.report.pages import Recorded, Results, compared, render

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    project = Path(snakemake.params.project)
    recorded = Recorded(project / "docs/tables")
    experiments = {name: Experiment.model_validate(each) for name, each in snakemake.params.experiments.items()}
    plotted = Path(snakemake.input.reported), Path(snakemake.input.rerun)
    fresh = Results(Path("results"), experiments, plotted, recorded.fidelity())
    for template, page in zip(map(Path, snakemake.input.templates), map(Path, snakemake.output.pages), strict=True):
        with atomic_write(page) as staging:
            staging.write_text(render(template, fresh, project), encoding="utf-8")
        committed = project / "docs" / page.name
        same = compared(render(template, fresh, project, recorded.provenance), committed)
        print(f"{page}: {same}")
        if "\n" in same:
            print(f"{page}: {same.partition(':')[0]}; {snakemake.log[0]} shows them", file=sys.stderr)

"""Snakemake job: the verdict on every claim, as a table, as a page and as captions of the report."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from joblog import logged

from fastserve.core.files import atomic_write
from harness.analysis.against_itself import shares
from harness.analysis.claims import Claims, claims_table
from harness.analysis.files import read_table, write_csv, write_json
from harness.analysis.measures import Evidence
from harness.analysis.points import load_reported
from harness.experiments.experiment import Experiment
from harness.report.captions import findings
from harness.report.claims_page import claims_page

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    plotted = Path(snakemake.input.reported), Path(snakemake.input.rerun)
    evidence = {}
    for path in map(Path, snakemake.input.points):
        experiment = Experiment.model_validate(snakemake.params.experiments[path.parent.name])
        evidence[path.parent.name] = Evidence(experiment, read_table(path), load_reported(*plotted, experiment))
    table = claims_table(Claims.model_validate(snakemake.params.claims).claims, evidence)
    write_csv(table, Path(snakemake.output.table))
    itself = shares(pd.read_csv(snakemake.input.against_itself))
    with atomic_write(Path(snakemake.output.page)) as staging:
        staging.write_text(claims_page(table, itself), encoding="utf-8")
    write_json(findings(table, itself), Path(snakemake.output.captions))
    for row in table.itertuples():
        print(f"{row.verdict:14} {row.claim}")
    print(f"wrote {snakemake.output.table}")

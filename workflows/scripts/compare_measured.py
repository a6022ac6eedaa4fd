"""Snakemake job: measured runs beside simulations of them, and what other policies would have done there."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from joblog import logged

from fastserve.core.files import atomic_write
from harness.analysis.files import read_table, write_csv, write_json
from harness.experiments.experiment import Experiment
from harness.studies.measured.errors import describe_errors, errors_page, with_peer
from harness.studies.measured.policies import describe_policies, policies_page, policies_table
from harness.studies.measured.replay import replay

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    experiment = Experiment.model_validate(snakemake.params.experiment)
    out = Path(snakemake.output.errors).parent
    replayed = replay(experiment, out / "runs")
    errors = with_peer(replayed.errors, pd.read_csv(snakemake.input.peer))
    policies = policies_table(experiment, read_table(Path(snakemake.input.points)))
    described = [*describe_errors(errors), *describe_policies(policies)]
    for name, table in {
        "errors": errors,
        "policies": policies,
        "requests": replayed.requests,
        "occupancy": replayed.occupancy,
        "replays": replayed.runs,
    }.items():
        write_csv(table, Path(snakemake.output[name]))
    with atomic_write(Path(snakemake.output.page)) as staging:
        staging.write_text(f"{errors_page(errors)}\n{policies_page(policies)}", encoding="utf-8")
    text = "\n".join(f"* {line}" for line in described)
    write_json({snakemake.wildcards.experiment: text}, Path(snakemake.output.captions))
    print("\n".join(described))
    print(f"wrote {snakemake.output.page}")

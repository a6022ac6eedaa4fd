# What the rules share: the experiments, checked, and the files that belong to each.
import re
from dataclasses import asdict
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

from fastserve.errors import FastServeError
from harness.points import FILES, check_experiment, point_folder, run_config

SMOKE = "smoke/"
SCHEMA = workflow.source_path("../schemas/config.schema.yaml")
REPORTED_POINTS = workflow.source_path("../data/reported_points.csv")
# Inputs of the cheap steps, which are repeated when these change. A measurement is repeated by --forcerun.
HARNESS_POINTS = workflow.source_path("../harness/points.py")
HARNESS_CAPACITY = workflow.source_path("../harness/capacity.py")
HARNESS_PLOTS = workflow.source_path("../harness/plots.py")

smoke_config = yaml.safe_load(Path(workflow.source_path("../config/smoke.yaml")).read_text(encoding="utf-8"))
validate(config, SCHEMA)
validate(smoke_config, SCHEMA)

EXPERIMENTS = config["experiments"] | {SMOKE + name: value for name, value in smoke_config["experiments"].items()}
for _name, _experiment in EXPERIMENTS.items():
    try:
        check_experiment(_name, _experiment)
    except FastServeError as error:
        raise WorkflowError(str(error)) from None


def results_of(name):
    """What an experiment ends in."""
    figures = [f"figures/{name}.png", f"figures/{name}.pdf"]
    return figures + [f"results/{name}/{table}.csv" for table in tables_of(name)]


def tables_of(name):
    """Names of an experiment's tables."""
    return ["points", "capacity"] if has_capacity(EXPERIMENTS[name]) else ["points"]


def has_capacity(experiment):
    """Whether there is an SLO to find the capacity for; real runs are too short to say."""
    return experiment["kind"] == "sim" and experiment["slo"] is not None


def files_of_sweep(name, file):
    """One file of every rate; series and seed stay wildcards."""
    experiment = EXPERIMENTS[name]
    return [
        f"results/{name}/{point_folder('{series}', point['rate'], '{seed}')}/{file}" for point in experiment["points"]
    ]


def files_of_experiment(file):
    """An input function: one file of every point."""
    return lambda wildcards: [
        path.format(series=series["name"], seed=seed)
        for path in files_of_sweep(wildcards.experiment, file)
        for series in EXPERIMENTS[wildcards.experiment]["series"]
        for seed in EXPERIMENTS[wildcards.experiment]["seeds"]
    ]


def configs_of_sweep(name):
    """A params function: what each rate runs, in the order of the files."""

    def configs(wildcards):
        experiment = EXPERIMENTS[name]
        series = next(series for series in experiment["series"] if series["name"] == wildcards.series)
        return [asdict(run_config(experiment, series, point, int(wildcards.seed))) for point in experiment["points"]]

    return configs


def definition(*keys):
    """A params function: the experiment, or what a step uses of it, so that a change elsewhere does not repeat the step."""
    return lambda wildcards: {key: EXPERIMENTS[wildcards.experiment][key] for key in keys}

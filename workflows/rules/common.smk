# What the rules share: the experiments, checked; the batches their runs are carried out in; the files of each.
import re
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

from baselines.external.environment import RECIPES, has_nvidia_gpu
from fastserve.core.errors import FastServeError
from harness.studies.agreement import recorded_folders
from harness.report.captions import Finding
from harness.analysis.claims import check_claims, claimed_experiments
from harness.experiments.imports import code_digest
from harness.experiments.experiments import BOTH, SERVED, batches_of, check_experiment, linked, points_of, with_defaults

BASE = Path(workflow.basedir)
SCHEMA = workflow.source_path("../schemas/experiment.schema.yaml")
CLAIMS_SCHEMA = workflow.source_path("../schemas/claims.schema.yaml")
REPORTED_POINTS = workflow.source_path("../data/reported_points.csv")


def code_of(script):
    """The code of a cheap step, as a digest: a parameter, so that the step is repeated if its code changes.

    Measurements name no code. They are repeated if their configuration changes, or on request (--forcerun).
    """
    return code_digest(BASE / "workflows/scripts" / script, BASE)


def from_text(value):
    """A value of the configuration: of `--config claims=null seeds=[0,1]` snakemake makes "null" and ["0", "1"]."""
    if isinstance(value, list):
        return [from_text(each) for each in value]
    with suppress(yaml.YAMLError):
        return yaml.safe_load(value) if isinstance(value, str) else value
    return value


def read_yaml(path):
    """What a YAML file holds, which must be a mapping."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise WorkflowError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise WorkflowError(f"{path} must hold keys with values, as in workflows/config; it holds {content!r:.60}")
    return content


def read_experiments(folder, prefix=""):
    """Every experiment of a folder, validated, by name. The seeds of the configuration, if given, replace theirs."""
    folder = Path(folder)
    paths = [folder] if folder.is_file() else sorted(folder.glob("*.yaml"))
    found = {path.stem: read_yaml(path) for path in paths}
    if not found:
        raise WorkflowError(f"there are no experiments (*.yaml) in {folder}; see workflows/config/experiments")
    experiments = {}
    for name, raw in linked(found).items():
        try:
            validate(raw, SCHEMA)
            if config["seeds"] is not None:
                raw["seeds"] = config["seeds"]
            experiments[prefix + name] = with_defaults(raw)
            check_experiment(prefix + name, experiments[prefix + name])
        except WorkflowError as error:
            raise WorkflowError(f"experiment {name!r} of {folder}: {error}") from None
    return experiments


def located(path):
    """A path of the configuration: of the working directory, or of the project."""
    return path if Path(path).exists() else BASE / path


config |= {key: from_text(value) for key, value in config.items()}
validate(config, workflow.source_path("../schemas/config.schema.yaml"))
try:
    FULL = read_experiments(located(config["experiments"]))
    SMOKE = read_experiments(BASE / "workflows/config/smoke", "smoke/")
    # Targets of their own, not of the report: they install what they measure.
    EXTERNAL = read_experiments(BASE / "workflows/config/external")
    EXPERIMENTS = EXTERNAL | FULL | SMOKE
    CLAIMS = read_yaml(located(config["claims"])) if config["claims"] else {"claims": []}
    validate(CLAIMS, CLAIMS_SCHEMA)
    try:
        check_claims(CLAIMS["claims"], FULL)
    except FastServeError as error:
        raise WorkflowError(f"{error}; --config claims=null leaves the claims out") from None
    # Those beyond the paper last: a run that they share with a figure of the paper belongs to the figure's batches.
    BATCHES = batches_of(
        EXPERIMENTS[name] for name in sorted(EXPERIMENTS, key=lambda name: (name.startswith(("beyond", "own")), name))
    )
except FastServeError as error:
    raise WorkflowError(str(error)) from None

BATCH_OF_RUN = {run: name for name, batch in BATCHES.items() for run in batch.runs}
# Targets: all experiments whose names begin alike, and each by its own.
GROUPS = {}
for _name in FULL:
    GROUPS.setdefault(_name.partition("-")[0], []).append(_name)
GROUPS = {_name: [_name] for _name in FULL} | GROUPS
_taken = sorted(({"report", "headline", "smoke", "recorded"} & GROUPS.keys()) | (EXTERNAL.keys() & GROUPS.keys()))
if _taken:
    raise WorkflowError(f"an experiment's name may not begin with {_taken[0]!r}, which is a target")

VLLM = BASE / ".venv-vllm"


# What was measured on GPUs, by the name of its folder below results/recorded.
RECORDED = {folder.name: folder for folder in recorded_folders(Path("results"))}
RECORDED_VIEWS = ("latency", "agreement")
NOTHING_RECORDED = "nothing is recorded: make gpu, on a machine with a GPU, writes results/recorded"


def results_of(name):
    """What an experiment ends in."""
    figures = [f"figures/{name}.png", f"figures/{name}.pdf"]
    return figures + [f"results/{name}/{table}.csv" for table in tables_of(name)]


def tables_of(name):
    """Names of an experiment's tables."""
    experiment = EXPERIMENTS[name]
    made = {"points": True, "capacity": experiment["slo"] is not None, "targets": bool(experiment["targets"])}
    return [table for table, is_made in made.items() if is_made]


def headline_results():
    """The table of claims, as numbers, as a page and as a figure."""
    if not CLAIMS["claims"]:
        return []
    return ["results/headline/claims.csv", "results/headline/claims.html", "figures/headline.png"]


def recorded_results():
    """The table and the figures of every folder of recorded runs."""
    figures = [
        f"figures/recorded-{gpu}-{view}.{kind}"
        for gpu in RECORDED
        for view in RECORDED_VIEWS
        for kind in ("png", "pdf")
    ]
    return figures + [f"results/recorded-{gpu}/points.csv" for gpu in RECORDED]


def files_of_recorded(wildcards):
    """What the runs of a folder, and what they rest on, are read from."""
    folder = RECORDED[wildcards.gpu]
    return [folder / "plan.json", folder / "profile.json", *sorted(folder.glob("runs/*/summary.json"))]


def batch_files(name):
    """The batches that hold the runs of an experiment."""
    batches = dict.fromkeys(BATCH_OF_RUN[point.run] for point in points_of(EXPERIMENTS[name]))
    return [f"results/batches/{batch}.json" for batch in batches]


def definition(wildcards):
    """A params function: the experiment, so that a step is repeated if it changes."""
    return EXPERIMENTS[wildcards.experiment]


@cache
def vllm_kind():
    """Which vLLM is installed and measured."""
    if config["vllm"] != "auto":
        return config["vllm"]
    return "cuda" if has_nvidia_gpu() else "cpu"


def has_vllm(name):
    """Whether an experiment measures vLLM's own server."""
    return any(series.get("server", "").startswith("vllm") for series in EXPERIMENTS[name]["series"])


def served_definition(wildcards):
    """A params function: the experiment, on the device that the vLLM in it is for."""
    experiment = EXPERIMENTS[wildcards.experiment]
    device = {"device": vllm_kind()} if has_vllm(wildcards.experiment) else {}
    return experiment | {"run": device | experiment["run"]}


def configs_of_batch(wildcards):
    """A params function: what the runs of a batch are."""
    return [asdict(config) for config in BATCHES[wildcards.batch].configs]

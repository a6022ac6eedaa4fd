# What the rules share: the experiments, checked; the batches their runs are carried out in; the files of each.
import logging
import os
import re
from functools import cache
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger
from snakemake.settings.enums import Quietness

from baselines.external.environment import RECIPES, has_nvidia_gpu
from fastserve.core.errors import FastServeError
from harness.analysis.claims import Claims, check_claims
from harness.experiments.batches import batches_of
from harness.experiments.configuration import read_configuration
from harness.experiments.experiment import BOTH, SERVED
from harness.experiments.files import parse_as, read_yaml
from harness.experiments.folder import quick_look, read_experiments
from harness.experiments.imports import code_digest
from harness.experiments.points import points_of
from harness.pipeline.workers import Job, Workers
from harness.report.captions import Finding
from harness.report.pages.render import page_name, templates
from harness.report.plots.headline import LOADS
from harness.studies.agreement import recorded_folders

BASE = Path(workflow.basedir)
REPORTED_POINTS = workflow.source_path("../data/reported_points.csv")
RERUN_POINTS = workflow.source_path("../data/artifact_rerun_points.csv")


def code_of(script):
    """The code of a cheap step, as a digest: a parameter, so that the step is repeated if its code changes.

    Measurements name no code. They are repeated if their configuration changes, or on request (--forcerun).
    """
    return code_digest(BASE / "workflows/scripts" / script, BASE)


def located(path):
    """A path of the configuration: of the working directory, or of the project."""
    return Path(path) if Path(path).exists() else BASE / path


def read_claims(path):
    """The claims that are held against the results; none if the configuration has none."""
    if path is None:
        return Claims(claims=())
    claims = parse_as(Claims, read_yaml(located(path)), path)
    try:
        check_claims(claims, FULL, path)
    except FastServeError as error:
        raise WorkflowError(f"{error}; --config claims=null leaves the claims out") from None
    return claims


try:
    CONFIG = read_configuration(config)
    FULL = read_experiments(located(CONFIG.experiments), seeds=CONFIG.seeds)
    if CONFIG.quick:
        FULL = quick_look(FULL)
    SMOKE = read_experiments(BASE / "workflows/config/smoke", "smoke/", CONFIG.seeds)
    # Targets of their own, not of the report: they install what they measure.
    EXTERNAL = read_experiments(BASE / "workflows/config/external", seeds=CONFIG.seeds)
    EXPERIMENTS = EXTERNAL | FULL | SMOKE
    # A quick look gives no verdict.
    CLAIMS = read_claims(None if CONFIG.quick else CONFIG.claims)
    # What claims may be made of a load on: each series is compared with itself there.
    WITH_LOADS = [name for name in CLAIMS.experiments if FULL[name].slo is not None]
    POINTS = {name: tuple(points_of(experiment)) for name, experiment in EXPERIMENTS.items()}
    # Those beyond the paper last: a run that they share with a figure of the paper belongs to the figure's batches.
    BATCHES = batches_of(
        POINTS[name] for name in sorted(POINTS, key=lambda name: (name.startswith(("artifact", "beyond", "own")), name))
    )
except FastServeError as error:
    raise WorkflowError(str(error)) from None

WORKERS = Workers(lambda: workflow.cores or 1, BASE / "workflows/scripts")
BATCH_OF_RUN = {run: name for name, batch in BATCHES.items() for run in batch.runs}
# Targets: all experiments whose names begin alike, and each by its own.
GROUPS = {}
for _name in FULL:
    GROUPS.setdefault(_name.partition("-")[0], []).append(_name)
GROUPS = {_name: [_name] for _name in FULL} | GROUPS
_taken = sorted(
    ({"report", "written", "headline", "smoke", "recorded"} & GROUPS.keys()) | (EXTERNAL.keys() & GROUPS.keys())
)
if _taken:
    raise WorkflowError(f"an experiment's name may not begin with {_taken[0]!r}, which is a target")

VLLM = BASE / ".venv-vllm"


# What was measured on GPUs, by the name of its folder below results/recorded.
RECORDED = {folder.name: folder for folder in recorded_folders(Path("results"))}
HEADLINE_PAGES = {"headline": "Claims of the paper", "headline-loads": "Claims of the paper: loads"}
RECORDED_VIEWS = ("latency", "agreement")
NOTHING_RECORDED = "nothing is recorded: make gpu, on a machine with a GPU, writes results/recorded"


def results_of(name):
    """What an experiment ends in."""
    stems = [name, f"{name}-policies"] if EXPERIMENTS[name].figure == "measured" else [name]
    figures = [f"figures/{stem}.{kind}" for stem in stems for kind in ("png", "pdf")]
    return figures + [f"results/{name}/{table}.csv" for table in tables_of(name)]


def tables_of(name):
    """Names of an experiment's tables."""
    experiment = EXPERIMENTS[name]
    made = {
        "points": True,
        "capacity": experiment.slo is not None,
        "comparisons": bool(experiment.comparisons),
        "targets": bool(experiment.targets),
        "errors": experiment.figure == "measured",
    }
    return [table for table, is_made in made.items() if is_made]


def captions_of(name):
    """The file with what an experiment's caption says was found."""
    return f"results/{name if EXPERIMENTS[name].backend == BOTH else 'headline'}/captions.json"


def written():
    """The results of experiments that lack none, and the other results that are there. A failed job removes its own."""
    experiments = [results_of(name) for name in FULL]
    others = [[result] for result in headline_results() + page_results() + recorded_results()]
    return [result for each in experiments + others if all(map(os.path.exists, each)) for result in each]


def headline_results():
    """The table of claims, as numbers, as a page, and as a figure of the comparisons and one of the loads."""
    if not CLAIMS.claims:
        return []
    tables = [f"results/headline/{name}" for name in ("claims.csv", "claims.html", "a-a.csv")]
    are_loads = {claim.measure.kind == LOADS for claim in CLAIMS.claims if claim.group == "paper"}
    pages = [page for page in HEADLINE_PAGES if (page == "headline-loads") in are_loads]
    return [*tables, *(f"figures/{page}.png" for page in pages)]


# Pages of docs with fresh numbers (workflows/report/pages); they are about the shipped experiments.
SHIPPED = BASE / "workflows/config/experiments"
PAGE_TEMPLATES = [
    str(path)
    for path in templates(BASE / "workflows/report/pages")
    if CLAIMS.claims and located(CONFIG.experiments).samefile(SHIPPED)
]
SIMULATED = [name for name in FULL if EXPERIMENTS[name].backend not in (BOTH, SERVED)]


def page_results():
    """Every page with fresh numbers."""
    return [f"results/{page_name(Path(template))}" for template in PAGE_TEMPLATES]


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
    batches = dict.fromkeys(BATCH_OF_RUN[point.run] for point in POINTS[name])
    return [f"results/batches/{batch}.json" for batch in batches]


def definition(wildcards):
    """A params function: the experiment, so that a step is repeated if it changes."""
    return EXPERIMENTS[wildcards.experiment].as_written()


@cache
def vllm_kind():
    """Which vLLM is installed and measured."""
    if CONFIG.vllm != "auto":
        return CONFIG.vllm
    return "cuda" if has_nvidia_gpu() else "cpu"


def has_vllm(name):
    """Whether an experiment measures vLLM's own server."""
    return any((series.server or "").startswith("vllm") for series in EXPERIMENTS[name].series)


def served_definition(wildcards):
    """A params function: the experiment, on the device that the vLLM in it is for."""
    experiment = definition(wildcards)
    device = {"device": vllm_kind()} if has_vllm(wildcards.experiment) else {}
    return experiment | {"run": device | experiment.get("run", {})}


def configs_of_batch(wildcards):
    """A params function: what the runs of a batch are."""
    return [dict(vars(config)) for config in BATCHES[wildcards.batch].configs]


def steps_of(job):
    """How many steps of the progress a job is: its runs, if it simulates, else one if workers carry it out."""
    return len(BATCHES[job.wildcards.batch].runs) if job.rule.name == "simulate" else int(job.is_run)


def begin():
    """Show one line of progress, and let Snakemake tell of errors alone, if it is to be quiet about rules."""
    if Quietness.RULES in (workflow.output_settings.quiet or ()):
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.WARNING)
    WORKERS.show_progress(sum(map(steps_of, workflow.dag.needrun_jobs())))

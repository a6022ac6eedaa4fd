# Every experiment: its runs, its tables, its figure, and the verdict on each claim of the paper. To each call add
# --workflow-profile workflows/profiles/default: with it, jobs share worker processes and start none of their own.
#   snakemake -c all              everything of workflows/config: the target `report`
#   snakemake -c all fig11        one figure of the paper; so fig12 ... fig18, synthetic, beyond, own, fidelity, headline
#   snakemake -c all own-policy   an experiment by the name of its file
#   snakemake -c all gpu-truth    the simulator held against vLLM as others measured it on two GPUs (docs/gpu-truth.md)
#   snakemake -c all recorded     what was measured on GPUs (results/recorded), simulated again, compared and drawn
#   snakemake -c all real-vllm    installs vLLM into .venv-vllm and measures it beside our server; no part of the report
#   snakemake -c all smoke        a small one of each kind
#   snakemake --report FILE.html  the report, after any of these; with the target `written`, without what failed
from snakemake.utils import min_version

min_version("9.0")


configfile: workflow.source_path("workflows/config/default.yaml")


report: "workflows/report/workflow.rst"


include: "workflows/rules/common.smk"


onstart:
    begin()


onsuccess:
    WORKERS.close()


onerror:
    WORKERS.close()


wildcard_constraints:
    experiment="|".join(map(re.escape, EXPERIMENTS)),
    batch="[a-zA-Z0-9._-]+",
    gpu="|".join(map(re.escape, RECORDED)) or "-",
    view="|".join(RECORDED_VIEWS),
    claims="|".join(HEADLINE_PAGES),


rule report:
    default_target: True
    input:
        [result for name in FULL for result in results_of(name)],
        headline_results(),
        page_results(),
        recorded_results(),


rule written:
    input:
        written(),


rule headline:
    input:
        headline_results(),


rule recorded:
    input:
        recorded_results(),
    log:
        "results/logs/recorded.log",
    conda:
        "environment.yml"
    params:
        said=f"recorded on: {', '.join(RECORDED)}" if RECORDED else NOTHING_RECORDED,
    shell:
        "echo {params.said:q} | tee {log} >&2"


rule smoke:
    input:
        [result for name in SMOKE for result in results_of(name)],


for _group, _names in GROUPS.items():

    rule:
        name:
            _group
        input:
            [result for name in _names for result in results_of(name)],
        localrule: True


for _name in EXTERNAL:

    rule:
        name:
            _name
        input:
            results_of(_name),
        localrule: True


localrules:
    report,
    written,
    headline,
    recorded,
    smoke,
    install_vllm,


include: "workflows/rules/runs.smk"
include: "workflows/rules/external.smk"
include: "workflows/rules/tables.smk"
include: "workflows/rules/figures.smk"
include: "workflows/rules/recorded.smk"
include: "workflows/rules/measured.smk"

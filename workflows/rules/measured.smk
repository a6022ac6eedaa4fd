# Runs that others measured on GPUs: replayed in the simulator, compared, and what other policies would have done.
ruleorder: draw_measured > draw


MEASURED = [name for name, experiment in EXPERIMENTS.items() if experiment.figure == "measured"]
MEASURED_NAMES = "|".join(map(re.escape, MEASURED)) or "-"


rule compare_measured:
    input:
        points="results/{experiment}/points.csv",
        peer=workflow.source_path("../data/llmservingsim_errors.csv"),
    output:
        errors=report(
            "results/{experiment}/errors.csv",
            category=lambda wildcards: wildcards.experiment.partition("-")[0],
            labels=lambda wildcards: {"experiment": f"{EXPERIMENTS[wildcards.experiment].title}: errors"},
        ),
        policies="results/{experiment}/policies.csv",
        requests="results/{experiment}/requests.csv",
        occupancy="results/{experiment}/occupancy.csv",
        replays="results/{experiment}/replays.csv",
        page="results/{experiment}/tables.md",
        captions="results/{experiment}/captions.json",
    log:
        "results/logs/{experiment}-compare.log",
    wildcard_constraints:
        experiment=MEASURED_NAMES,
    params:
        code=code_of("compare_measured.py"),
        experiment=definition,
    run:
        WORKERS.script("compare_measured.py", Job(input, output, params, wildcards, log))


rule draw_measured:
    input:
        errors="results/{experiment}/errors.csv",
        policies="results/{experiment}/policies.csv",
        requests="results/{experiment}/requests.csv",
        occupancy="results/{experiment}/occupancy.csv",
        replays="results/{experiment}/replays.csv",
        points="results/{experiment}/points.csv",
        provenance="results/{experiment}/provenance.json",
    output:
        truth=report(
            "figures/{experiment}.png",
            category=lambda wildcards: wildcards.experiment.partition("-")[0],
            labels=lambda wildcards: {"experiment": EXPERIMENTS[wildcards.experiment].title},
            caption="../report/measured.rst",
        ),
        truth_pdf="figures/{experiment}.pdf",
        policies=report(
            "figures/{experiment}-policies.png",
            category=lambda wildcards: wildcards.experiment.partition("-")[0],
            labels={"experiment": "Simulated: what each policy would have done there"},
            caption="../report/measured.rst",
        ),
        policies_pdf="figures/{experiment}-policies.pdf",
    log:
        "results/logs/{experiment}-draw.log",
    wildcard_constraints:
        experiment=MEASURED_NAMES,
    params:
        code=code_of("draw_measured.py"),
        experiment=definition,
        finding=lambda wildcards: Finding(wildcards.experiment, f"results/{wildcards.experiment}/captions.json"),
    run:
        WORKERS.script("draw_measured.py", Job(input, output, params, wildcards, log))

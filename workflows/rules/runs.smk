# The measurements: one job a batch of runs, since starting up takes longer than most runs. Every run leaves a folder
# below results/runs; what was measured of all of a batch is its output. A real engine gets every core, so that nothing
# runs beside what is measured.
rule simulate:
    output:
        "results/batches/{batch}.json",
    log:
        "results/logs/{batch}.log",
    wildcard_constraints:
        batch="sim-.*",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=2000,
        runtime=20,
    params:
        configs=configs_of_batch,
        folder="results/runs",
    script:
        "../scripts/run_batch.py"


rule run_engine:
    output:
        "results/batches/{batch}.json",
    log:
        "results/logs/{batch}.log",
    wildcard_constraints:
        batch="engine-.*",
    conda:
        "../../environment.yml"
    threads: lambda wildcards: workflow.cores
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=lambda wildcards: int(any(config.device == "cuda" for config in BATCHES[wildcards.batch].configs)),
    params:
        configs=configs_of_batch,
        folder="results/runs",
    script:
        "../scripts/run_batch.py"


# Measures this machine, then runs the real engine and the simulator on the same requests, in one process.
rule measure_fidelity:
    output:
        "results/{experiment}/points.csv",
    log:
        "results/logs/{experiment}-fidelity.log",
    wildcard_constraints:
        experiment="|".join(re.escape(name) for name, experiment in EXPERIMENTS.items() if experiment.backend == BOTH)
        or "-",
    conda:
        "../../environment.yml"
    threads: lambda wildcards: workflow.cores
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        experiment=definition,
    script:
        "../scripts/fidelity.py"

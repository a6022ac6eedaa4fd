# The measurements. A batch is the runs of one series with one seed. Workers, one a core, take simulated runs from one
# queue, in which the runs of several batches wait. A real engine runs in a process of its own and gets every core, so
# that nothing runs beside what is measured.
rule simulate:
    output:
        results="results/batches/{batch}.json",
        requests="results/batches/{batch}.requests.parquet",
    log:
        "results/logs/{batch}.log",
    wildcard_constraints:
        batch="sim-.*",
    resources:
        mem_mb=2000,
        runtime=20,
    params:
        configs=configs_of_batch,
    run:
        WORKERS.runs(params.configs, Path(output.results), Path(log[0]))


rule run_engine:
    output:
        results="results/batches/{batch}.json",
        requests="results/batches/{batch}.requests.parquet",
        iterations="results/batches/{batch}.iterations.parquet",
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
    script:
        "../scripts/run_batch.py"


# Measures this machine, then runs the real engine and the simulator on the same requests, in one process. It fails on
# a machine that other programs keep busy; nothing but its own figure depends on it.
rule measure_fidelity:
    output:
        points="results/{experiment}/points.csv",
        pairs="results/{experiment}/pairs.csv",
        captions="results/{experiment}/captions.json",
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

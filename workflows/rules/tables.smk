# From batches to tables: cheap, and repeated when their own code changes.
ruleorder: measure_fidelity > collect
ruleorder: measure_served > collect


rule collect:
    input:
        batches=lambda wildcards: batch_files(wildcards.experiment),
    output:
        points="results/{experiment}/points.csv",
        provenance="results/{experiment}/provenance.json",
    log:
        "results/logs/{experiment}-collect.log",
    params:
        code=code_of("collect.py"),
        experiment=definition,
    run:
        WORKERS.script("collect.py", Job(input, output, params, wildcards, log))


rule capacity:
    input:
        points="results/{experiment}/points.csv",
        reported=REPORTED_POINTS,
        rerun=RERUN_POINTS,
    output:
        "results/{experiment}/capacity.csv",
    log:
        "results/logs/{experiment}-capacity.log",
    params:
        code=code_of("capacity.py"),
        experiment=definition,
    run:
        WORKERS.script("capacity.py", Job(input, output, params, wildcards, log))


rule comparisons:
    input:
        points="results/{experiment}/points.csv",
        reported=REPORTED_POINTS,
        rerun=RERUN_POINTS,
    output:
        "results/{experiment}/comparisons.csv",
    log:
        "results/logs/{experiment}-comparisons.log",
    params:
        code=code_of("comparisons.py"),
        experiment=definition,
    run:
        WORKERS.script("comparisons.py", Job(input, output, params, wildcards, log))


rule targets:
    input:
        points="results/{experiment}/points.csv",
    output:
        report(
            "results/{experiment}/targets.csv",
            category=lambda wildcards: wildcards.experiment.partition("-")[0],
            labels=lambda wildcards: {"experiment": f"{EXPERIMENTS[wildcards.experiment].title}: targets"},
        ),
    log:
        "results/logs/{experiment}-targets.log",
    params:
        code=code_of("targets.py"),
        experiment=definition,
    run:
        WORKERS.script("targets.py", Job(input, output, params, wildcards, log))


rule against_itself:
    input:
        points=[f"results/{name}/points.csv" for name in WITH_LOADS],
    output:
        report(
            "results/headline/a-a.csv",
            category="Headline",
            labels={"result": "Each series against itself"},
            caption="../report/against_itself.rst",
        ),
    log:
        "results/logs/against-itself.log",
    params:
        code=code_of("against_itself.py"),
        experiments={name: FULL[name].as_written() for name in WITH_LOADS},
    run:
        WORKERS.script("against_itself.py", Job(input, output, params, wildcards, log))


if PAGE_TEMPLATES:

    rule pages:
        input:
            templates=PAGE_TEMPLATES,
            headline=["results/headline/claims.csv", "results/headline/a-a.csv"],
            tables=[f"results/{name}/{table}.csv" for name in SIMULATED for table in tables_of(name)],
            ready=[f"results/{name}/tables.md" for name in SIMULATED if EXPERIMENTS[name].figure == "measured"],
            provenance=[f"results/{name}/provenance.json" for name in SIMULATED],
            reported=REPORTED_POINTS,
            rerun=RERUN_POINTS,
        output:
            pages=page_results(),
        log:
            "results/logs/pages.log",
        params:
            code=code_of("pages.py"),
            project=lambda wildcards: str(BASE),
            experiments={name: FULL[name].as_written() for name in SIMULATED},
        run:
            WORKERS.script("pages.py", Job(input, output, params, wildcards, log))


rule claims:
    input:
        points=[f"results/{name}/points.csv" for name in CLAIMS.experiments],
        against_itself="results/headline/a-a.csv",
        reported=REPORTED_POINTS,
        rerun=RERUN_POINTS,
    output:
        table="results/headline/claims.csv",
        page=report(
            "results/headline/claims.html",
            category="Headline",
            labels={"result": "Verdicts"},
            caption="../report/claims.rst",
        ),
        captions="results/headline/captions.json",
    log:
        "results/logs/claims.log",
    params:
        code=code_of("claims.py"),
        claims=CLAIMS.model_dump(exclude_unset=True),
        experiments={name: FULL[name].as_written() for name in CLAIMS.experiments},
    run:
        WORKERS.script("claims.py", Job(input, output, params, wildcards, log))

# From tables to figures, and the report's captions.
rule draw:
    input:
        points="results/{experiment}/points.csv",
        capacity=branch(
            lambda wildcards: "capacity" in tables_of(wildcards.experiment), then="results/{experiment}/capacity.csv"
        ),
        provenance=branch(
            lambda wildcards: bool(POINTS[wildcards.experiment]), then="results/{experiment}/provenance.json"
        ),
        reported=REPORTED_POINTS,
        rerun=RERUN_POINTS,
    output:
        png=report(
            "figures/{experiment}.png",
            category=lambda wildcards: wildcards.experiment.partition("-")[0],
            labels=lambda wildcards: {"experiment": EXPERIMENTS[wildcards.experiment].title},
            caption="../report/figure.rst",
        ),
        pdf="figures/{experiment}.pdf",
    log:
        "results/logs/{experiment}-draw.log",
    params:
        code=code_of("draw.py"),
        experiment=definition,
        finding=lambda wildcards: Finding(wildcards.experiment, captions_of(wildcards.experiment)),
    run:
        WORKERS.script("draw.py", Job(input, output, params, wildcards, log))


rule draw_headline:
    input:
        table="results/headline/claims.csv",
    output:
        png=report(
            "figures/{claims}.png",
            category="Headline",
            labels=lambda wildcards: {"result": HEADLINE_PAGES[wildcards.claims]},
            caption="../report/headline.rst",
        ),
        pdf="figures/{claims}.pdf",
    log:
        "results/logs/{claims}-draw.log",
    params:
        code=code_of("draw_headline.py"),
        loads=lambda wildcards: wildcards.claims == "headline-loads",
    run:
        WORKERS.script("draw_headline.py", Job(input, output, params, wildcards, log))

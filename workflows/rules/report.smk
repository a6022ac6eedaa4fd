# From points to tables and figures.
rule collect:
    input:
        summaries=files_of_experiment("summary.json"),
        code=HARNESS_POINTS,
    output:
        "results/{experiment}/points.csv",
    log:
        "results/{experiment}/logs/collect.log",
    conda:
        "../../environment.yml"
    params:
        experiment=definition("series", "points", "seeds"),
    script:
        "../scripts/collect.py"


rule capacity:
    input:
        points="results/{experiment}/points.csv",
        reported=REPORTED_POINTS,
        code=[HARNESS_POINTS, HARNESS_CAPACITY],
    output:
        "results/{experiment}/capacity.csv",
    log:
        "results/{experiment}/logs/capacity.log",
    conda:
        "../../environment.yml"
    params:
        experiment=definition("series", "metric", "slo", "paper"),
    script:
        "../scripts/capacity.py"


rule draw:
    input:
        points="results/{experiment}/points.csv",
        reported=REPORTED_POINTS,
        meta=files_of_experiment("meta.json"),
        code=[HARNESS_POINTS, HARNESS_CAPACITY, HARNESS_PLOTS],
    output:
        png="figures/{experiment}.png",
        pdf="figures/{experiment}.pdf",
    log:
        "results/{experiment}/logs/draw.log",
    conda:
        "../../environment.yml"
    params:
        experiment=lambda wildcards: EXPERIMENTS[wildcards.experiment],
    script:
        "../scripts/draw.py"

# From points to tables and figures.
rule collect:
    input:
        files_of_experiment("summary.json"),
    output:
        "results/{experiment}/points.csv",
    log:
        "results/{experiment}/logs/collect.log",
    params:
        experiment=definition("series", "points", "seeds"),
    conda:
        "../../environment.yml"
    script:
        "../scripts/collect.py"


rule capacity:
    input:
        points="results/{experiment}/points.csv",
        reported=REPORTED_POINTS,
    output:
        "results/{experiment}/capacity.csv",
    log:
        "results/{experiment}/logs/capacity.log",
    params:
        experiment=definition("series", "metric", "slo", "paper"),
    conda:
        "../../environment.yml"
    script:
        "../scripts/capacity.py"


rule draw:
    input:
        points="results/{experiment}/points.csv",
        reported=REPORTED_POINTS,
        meta=files_of_experiment("meta.json"),
    output:
        png="figures/{experiment}.png",
        pdf="figures/{experiment}.pdf",
    log:
        "results/{experiment}/logs/draw.log",
    params:
        experiment=lambda wildcards: EXPERIMENTS[wildcards.experiment],
    conda:
        "../../environment.yml"
    script:
        "../scripts/draw.py"

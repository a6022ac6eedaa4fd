# From tables to figures, and the report's captions.
rule draw:
    input:
        points="results/{experiment}/points.csv",
        capacity=branch(
            lambda wildcards: "capacity" in tables_of(wildcards.experiment), then="results/{experiment}/capacity.csv"
        ),
        reported=REPORTED_POINTS,
        code=harness_files(
            "report/plots", "report/captions.py", "analysis/derived.py", "analysis/intervals.py", "analysis/points.py"
        ),
    output:
        png=report(
            "figures/{experiment}.png",
            category=lambda wildcards: wildcards.experiment.partition("-")[0],
            labels=lambda wildcards: {"experiment": EXPERIMENTS[wildcards.experiment]["title"]},
            caption="../report/figure.rst",
        ),
        pdf="figures/{experiment}.pdf",
    log:
        "results/logs/{experiment}-draw.log",
    conda:
        "../../environment.yml"
    params:
        experiment=definition,
        finding=lambda wildcards: Finding(wildcards.experiment, "results/headline/captions.json"),
    script:
        "../scripts/draw.py"


rule draw_headline:
    input:
        table="results/headline/claims.csv",
        code=harness_files("report/plots"),
    output:
        png=report(
            "figures/headline.png",
            category="Headline",
            labels={"result": "Ours over the paper's"},
            caption="../report/headline.rst",
        ),
        pdf="figures/headline.pdf",
    log:
        "results/logs/headline-draw.log",
    conda:
        "../../environment.yml"
    script:
        "../scripts/draw_headline.py"

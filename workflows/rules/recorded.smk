# Runs that `make gpu` recorded (results/recorded/GPU): simulated again, compared, and drawn.
rule compare_recorded:
    input:
        recorded=files_of_recorded,
    output:
        points="results/recorded-{gpu}/points.csv",
        captions="results/recorded-{gpu}/captions.json",
    log:
        "results/logs/recorded-{gpu}.log",
    resources:
        mem_mb=2000,
        runtime=20,
    params:
        code=code_of("compare_recorded.py"),
    run:
        WORKERS.script("compare_recorded.py", Job(input, output, params, wildcards, log))


rule draw_recorded:
    input:
        points="results/recorded-{gpu}/points.csv",
    output:
        png=report(
            "figures/recorded-{gpu}-{view}.png",
            category="Recorded on a GPU",
            labels={"machine": "{gpu}", "figure": "{view}"},
            caption="../report/recorded.rst",
        ),
        pdf="figures/recorded-{gpu}-{view}.pdf",
    log:
        "results/logs/recorded-{gpu}-{view}-draw.log",
    params:
        code=code_of("draw_recorded.py"),
        finding=lambda wildcards: Finding(wildcards.gpu, f"results/recorded-{wildcards.gpu}/captions.json"),
    run:
        WORKERS.script("draw_recorded.py", Job(input, output, params, wildcards, log))

# Servers driven over HTTP, ours and others. What is not ours gets an environment of its own, never a place in ours.
rule install_vllm:
    input:
        requirements=lambda wildcards: RECIPES[vllm_kind()].requirements,
    output:
        versions=VLLM / "versions.json",
    log:
        "results/logs/install-vllm.log",
    conda:
        "../../environment.yml"
    params:
        kind=lambda wildcards: vllm_kind(),
    script:
        "../scripts/install_vllm.py"


# All servers are started and take turns, in one job that has the machine for itself.
rule measure_served:
    input:
        vllm=branch(lambda wildcards: has_vllm(wildcards.experiment), then=VLLM / "versions.json"),
    output:
        points="results/{experiment}/points.csv",
        comparison="results/{experiment}/comparison.csv",
        agreement="results/{experiment}/agreement.csv",
        servers="results/{experiment}/servers.json",
    log:
        "results/logs/{experiment}-served.log",
    wildcard_constraints:
        experiment="|".join(
            re.escape(name) for name, experiment in EXPERIMENTS.items() if experiment.backend == SERVED
        )
        or "-",
    conda:
        "../../environment.yml"
    threads: lambda wildcards: workflow.cores
    resources:
        mem_mb=8000,
        runtime=60,
        gpu=lambda wildcards: int(served_definition(wildcards)["run"].get("device") == "cuda"),
    params:
        experiment=served_definition,
    script:
        "../scripts/served.py"

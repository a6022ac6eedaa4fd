# The measurements. One rule an experiment, since its rates are its outputs; one job a series and seed, since starting
# up takes longer than most points. A real engine gets every core, so that nothing runs beside what is measured.
for _name, _experiment in EXPERIMENTS.items():

    rule:
        name:
            f"sweep_{re.sub('[^a-z0-9]', '_', _name)}"
        output:
            **{file.partition(".")[0]: files_of_sweep(_name, file) for file in FILES},
        log:
            f"results/{_name}/logs/{{series}}-seed-{{seed}}.log",
        conda:
            "../../environment.yml"
        threads: workflow.cores if _experiment["kind"] == "engine" else 1
        params:
            configs=configs_of_sweep(_name),
            torch_threads=_experiment.get("engine", {}).get("torch_threads"),
        script:
            "../scripts/sweep.py"

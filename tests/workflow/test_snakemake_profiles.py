"""The profiles in workflows/profiles, with a small Snakefile that has the pipeline's rules by name.

There is no Slurm here: programs of the same names stand in for its own. sbatch writes down what it is given and carries
it out, so that the jobs really go through the plugin, from submission to the last output.
"""

import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("snakemake")

PROFILES = Path(__file__).resolve().parents[2] / "workflows" / "profiles"

SNAKEFILE = """
localrules: all

rule all:
    input: "claims.txt"

rule simulate:
    output: "runs/sim-{batch}.txt"
    log: "logs/{batch}.log"
    params: rate=config["rate"]
    shell:
        "date +%s.%N > {output}; sleep 0.5; date +%s.%N >> {output}; "
        "test {wildcards.batch} != bad || {{ printf 'the cache %s' 'ran out' | tee {log} >&2; false; }}"

rule run_engine:
    output: "runs/engine-{batch}.txt"
    threads: lambda wildcards: workflow.cores
    resources: gpu=config["gpus"]
    shell: "date +%s.%N > {output}; sleep 0.5; date +%s.%N >> {output}"

rule collect:
    input: expand("runs/{run}.txt", run=config["runs"])
    output: "tables/{experiment}/points.csv"
    params: code=config["code"]
    shell: "cat {input} > {output}"

rule capacity:
    input: "tables/{experiment}/points.csv"
    output: "tables/{experiment}/capacity.csv"
    shell: "cp {input} {output}"

rule draw:
    input: "tables/{experiment}/capacity.csv"
    output: "figures/{experiment}.png"
    shell: "cp {input} {output}"

rule claims:
    input: "tables/e/points.csv", "figures/e.png"
    output: "claims.txt"
    shell: "cat {input} > {output}"
"""

PREAMBLE = """#!{python}
import json, os, subprocess, sys, time
from pathlib import Path

name, folder = os.path.basename(sys.argv[0]), Path({folder!r})
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
"""
SLURM = {
    "sbatch": """
def value(option):
    return sys.argv[sys.argv.index(option) + 1]

job_id = str(time.time_ns())
(wrapped,) = (argument.removeprefix("--wrap=") for argument in sys.argv if argument.startswith("--wrap="))
with open(value("--output").replace("%j", job_id), "w") as log:
    environment = os.environ | {"SLURM_JOB_ID": job_id}
    job = subprocess.run(["sh", "-c", wrapped], cwd=value("-D"), env=environment, stdout=log, stderr=log)
(folder / "jobs" / job_id).write_text("FAILED" if job.returncode else "COMPLETED")
print(job_id)
""",
    "srun": """
command = sys.argv[1:]
while command[0].startswith("-"):
    del command[0]
os.execvp(command[0], command)
""",
    "sacct": """
if "--name" in sys.argv:
    for job in (folder / "jobs").iterdir():
        print(job.name, job.read_text(), sep="|")
""",
    "sacctmgr": "print('lab')",
    "sinfo": "print('PARTITION', 'shared*', 'accelerated', sep='\\n')",
    "scontrol": "print('MaxArraySize = 1001', 'MinJobAge = 300 sec', sep='\\n')",
    "squeue": "",
    "scancel": "",
}


def make_pipeline(folder, **config):
    """Write the Snakefile and its configuration; `code` is the digest of the code that `collect` rests on."""
    defaults = {"rate": 1, "gpus": 1, "runs": ["sim-a", "engine-a"], "code": "digest"}
    (folder / "Snakefile").write_text(SNAKEFILE, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(defaults | config), encoding="utf-8")


def snakemake(folder, profile, *arguments, **environment):
    own = {name: value for name, value in os.environ.items() if "SLURM" not in name and not name.startswith("SBATCH_")}
    command = [sys.executable, "-m", "snakemake", "--workflow-profile", PROFILES / profile]
    return subprocess.run(
        [*command, "--configfile", "config.json", *arguments],
        cwd=folder,
        env=own | {"XDG_CACHE_HOME": str(folder / "cache")} | environment,
        capture_output=True,
        text=True,
        timeout=180,
    )


def rules_to_run(folder, profile):
    """The rules of which a dry run lists jobs."""
    dry = snakemake(folder, profile, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    _, found, table = (dry.stdout + dry.stderr).partition("Job stats:\n")
    names = [line.split()[0] for line in table.partition("\n\n")[0].splitlines()]
    return set(names[2:-1]) if found else set()  # Without the two lines of its head, and the total.


def span(path):
    """When a run began and ended."""
    return tuple(float(line) for line in path.read_text(encoding="utf-8").splitlines())


def test_snakemake_reads_every_profile(tmp_path):
    assert sorted(path.name for path in PROFILES.iterdir()) == ["default", "gpu", "slurm", "smoke"]
    make_pipeline(tmp_path)
    # The tests below run the pipeline with each of the others.
    everything = {"all", "simulate", "run_engine", "collect", "capacity", "draw", "claims"}
    assert rules_to_run(tmp_path, "smoke") == everything


def test_a_measurement_is_repeated_for_its_configuration_and_not_for_code(tmp_path):
    make_pipeline(tmp_path)
    first = snakemake(tmp_path, "default", "--cores", "2")
    assert first.returncode == 0, first.stderr

    snakefile = tmp_path / "Snakefile"
    snakefile.write_text(SNAKEFILE.replace("sleep 0.5", "sleep 0.4"), encoding="utf-8")
    assert rules_to_run(tmp_path, "default") == set()

    make_pipeline(tmp_path, code="changed")
    tables = {"all", "collect", "capacity", "draw", "claims"}
    assert rules_to_run(tmp_path, "default") == tables

    make_pipeline(tmp_path, code="changed", rate=2)
    assert rules_to_run(tmp_path, "default") == {"simulate"} | tables


def test_a_failure_shows_its_log_and_leaves_the_others_to_finish(tmp_path):
    make_pipeline(tmp_path, runs=["sim-bad", "sim-a", "sim-b", "engine-a"])
    failed = snakemake(tmp_path, "default", "--cores", "1")
    assert failed.returncode != 0
    assert "the cache ran out" in failed.stderr
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["engine-a.txt", "sim-a.txt", "sim-b.txt"]
    assert not (tmp_path / "tables").exists()


def test_gpu_runs_one_engine_at_a_time_and_simulations_beside_it(tmp_path):
    engines, simulations = ([f"{kind}-{i}" for i in range(3)] for kind in ("engine", "sim"))
    make_pipeline(tmp_path, runs=engines + simulations)
    done = snakemake(tmp_path, "gpu", "--cores", "12")
    assert done.returncode == 0, done.stderr
    of_engines = sorted(span(tmp_path / f"runs/{name}.txt") for name in engines)
    for (_, end), (begin, _) in itertools.pairwise(of_engines):
        assert end <= begin
    of_simulations = [span(tmp_path / f"runs/{name}.txt") for name in simulations]
    assert any(begin < end and other < until for begin, until in of_engines for other, end in of_simulations)


class Cluster:
    """The stand-in for Slurm in a folder."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "jobs").mkdir()
        for name, body in SLURM.items():
            program = folder / "bin" / name
            program.write_text(PREAMBLE.format(python=sys.executable, folder=str(folder)) + body, encoding="utf-8")
            program.chmod(0o755)

    def snakemake(self, *arguments, **names):
        """Run the slurm profile, looking after the jobs every second."""
        quickly = ["--slurm-init-seconds-before-status-checks", "1", "--seconds-between-status-checks", "1"]
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return snakemake(self.folder, "slurm", *quickly, "--latency-wait", "2", *arguments, PATH=path, **names)

    def calls(self, program):
        """The arguments of each call of a program."""
        calls = [json.loads(line) for line in (self.folder / "calls").read_text(encoding="utf-8").splitlines()]
        return [call[1:] for call in calls if call[0] == program]

    def submitted(self):
        """Of each job, by its comment: the options of sbatch, and the command it is to run."""
        jobs = {}
        for arguments in self.calls("sbatch"):
            *options, wrap = arguments
            assert wrap.startswith("--wrap=")
            jobs[options[options.index("--comment") + 1]] = options, shlex.split(wrap.removeprefix("--wrap="))
        return jobs


def after(arguments, option):
    """The value that follows an option."""
    return arguments[arguments.index(option) + 1]


def gpu_options(options):
    return [option for option in options if option.startswith(("--gpus", "--gres"))]


def test_slurm_jobs_ask_for_what_their_rules_need(tmp_path):
    make_pipeline(tmp_path)
    cluster = Cluster(tmp_path)
    done = cluster.snakemake(
        "figures/e.png",
        FASTSERVE_SLURM_ACCOUNT="lab",
        FASTSERVE_SLURM_PARTITION="cpu",
        FASTSERVE_SLURM_GPU_PARTITION="accelerated",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "figures/e.png").is_file()

    report = "rule_report_capacity_collect_draw"
    expected = {  # partition, minutes, MB, CPUs, GPUs, folder of the log, jobs to run
        "rule_simulate_wildcards_a": ("cpu", 60, 2000, 1, [], "rule_simulate/a", {"simulate:batch=a"}),
        "rule_run_engine_wildcards_a": (
            *("accelerated", 240, 96000, 8, ["--gpus=1"]),
            *("rule_run_engine/a", {"run_engine:batch=a"}),
        ),
        # A job of one CPU has its steps one after the other: time adds up, memory does not.
        report: (
            *("cpu", 60, 2000, 1, [], report.replace("rule", "group", 1)),
            {f"{rule}:experiment=e" for rule in ("collect", "capacity", "draw")},
        ),
    }
    submitted = cluster.submitted()
    assert submitted.keys() == expected.keys()
    for name, (partition, minutes, memory, cpus, gpus, log, targets) in expected.items():
        options, command = submitted[name]
        assert after(options, "-A") == "lab"
        assert after(options, "-p") == partition
        assert after(options, "-t") == str(minutes)
        assert after(options, "--mem") == str(memory)
        assert f"--cpus-per-task={cpus}" in options
        assert gpu_options(options) == gpus
        assert after(options, "--output") == str(tmp_path / ".snakemake/slurm_logs" / log / "%j.log")
        assert after(options, "-D") == str(tmp_path)
        assert command[:3] == [sys.executable, "-m", "snakemake"]
        assert after(command, "--snakefile") == str(tmp_path / "Snakefile")
        start = command.index("--target-jobs") + 1
        assert set(command[start : command.index("--allowed-rules")]) == targets
        assert after(command, "--executor") == "slurm-jobstep"

    steps = {after(call, "--target-jobs"): call for call in cluster.calls("srun")}
    assert len(steps) == 5
    assert gpu_options(steps.pop("run_engine:batch=a")) == ["--gpus=1"]
    assert not any(gpu_options(call) for call in steps.values())


def test_slurm_decides_what_is_not_named_and_a_failure_shows_its_log(tmp_path):
    make_pipeline(tmp_path, gpus=0)
    cluster = Cluster(tmp_path)
    failed = cluster.snakemake("runs/engine-a.txt", "runs/sim-bad.txt")
    assert failed.returncode != 0
    assert "SLURM status is: 'FAILED'" in failed.stderr
    assert "the cache ran out" in failed.stderr
    assert (tmp_path / "runs/engine-a.txt").is_file()
    options, _ = cluster.submitted()["rule_run_engine_wildcards_a"]
    assert "-A" not in options
    assert after(options, "-p") == "shared"
    assert "--cpus-per-task=8" in options
    assert gpu_options(options) == []  # An engine on the CPU.

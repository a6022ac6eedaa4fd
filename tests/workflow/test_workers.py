"""The worker processes of the pipeline, without Snakemake."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.pipeline.batch import read_batches
from harness.pipeline.workers import Job, JobFailed, Workers
from harness.run.config import RunConfig, command_of

CONFIG = RunConfig(profile="a100-80g/opt-13b-tp1-swifttransformer", rate=2.0, num_requests=5, settings={"alpha_s": 1.5})


def write_script(folder, text):
    (folder / "step.py").write_text(text, encoding="utf-8")
    return Job(None, None, SimpleNamespace(value=3), None, ["step.log"])


def test_workers_outlive_failures_and_the_end_of_one_of_them(tmp_path):
    workers = Workers(lambda: 1, tmp_path)
    pid = tmp_path / "pid"
    job = write_script(
        tmp_path, f"import os; open({str(pid)!r}, 'w').write(f'{{os.getpid()}} {{snakemake.params.value}}')"
    )
    try:
        workers.script("step.py", job)
        first, value = pid.read_text().split()
        assert value == "3"
        with pytest.raises(JobFailed, match=r"step\.py ended with status 2; its log is step\.log"):
            workers.script("step.py", write_script(tmp_path, "raise SystemExit(2)"))
        with pytest.raises(JobFailed, match="a worker process ended"):
            workers.script("step.py", write_script(tmp_path, f"import os; os.kill(os.getpid(), {signal.SIGKILL})"))
        workers.script("step.py", write_script(tmp_path, f"open({str(pid)!r}, 'w').write('another')"))
        assert pid.read_text() == "another"
        assert int(first) != os.getpid()
        configs = [vars(replace(CONFIG, seed=seed)) for seed in range(3)]
        workers.runs(configs, tmp_path / "batch.json", tmp_path / "batch.log")
        bad = vars(replace(CONFIG, trace="fixed:prompt=100000,output=1"))
        with pytest.raises(JobFailed, match=r"100000 tokens .* to repeat this run alone: fastbench run"):
            workers.runs([bad, *configs], tmp_path / "none.json", tmp_path / "none.log")
    finally:
        workers.close()
    assert not (tmp_path / "none.json").exists()
    assert (tmp_path / "none.log").read_text(encoding="utf-8").count("took") == 3
    runs = read_batches([tmp_path / "batch.json"])
    assert [run["meta"]["configuration"]["seed"] for run in runs.values()] == [0, 1, 2]
    shared = json.loads((tmp_path / "batch.json").read_text(encoding="utf-8"))["meta"]
    assert shared["configuration"]["policy"] == "fastserve"
    assert "seed" not in shared["configuration"]


def test_a_command_has_every_option_that_differs_from_its_default():
    assert command_of(
        replace(CONFIG, trace="fixed:prompt=8,output=2", seed=4, settings={"swap": "none", "a": True})
    ) == (
        "fastbench run --trace fixed:prompt=8,output=2 --rate 2.0 --num-requests 5 --seed 4 "
        "--profile a100-80g/opt-13b-tp1-swifttransformer --set swap=none --set a=true"
    )
    assert Path(command_of(CONFIG).split()[-1]).name == "alpha_s=1.5"

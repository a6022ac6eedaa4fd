"""`fastbench run` on several ranks: the same four files, and what is left of them when a rank is lost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

psutil = pytest.importorskip("psutil")
pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
COMMAND = [
    sys.executable, "-m", "harness.cli", "run", "--backend", "engine", "--model", "opt-tiny", "--load-format", "dummy",
    "--policy", "fastserve", "--profile", "a100-80g/opt-13b-tp1", "--trace", "fixed:prompt=16,output=200",
    "--torch-threads", "2",
    "--set", "max_batch_size=4", "--set", "num_gpu_blocks=100", "--set", "num_host_blocks=20",
]  # fmt: skip


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/system:{ROOT}/workflows:{ROOT}"}
    return subprocess.Popen(
        [*COMMAND, *arguments], env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_run_on_two_stages(tmp_path: Path) -> None:
    process = start("--rate", "100", "--num-requests", "3", "--pipeline-parallel-size", "2", "--out", str(tmp_path))
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["finished"], summary["failed"]) == (3, 0)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["configuration"]["pipeline_parallel_size"] == 2
    assert meta["error"] is None


def ranks_of(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if "fastserve.worker" in child.cmdline()]


def test_a_lost_rank_leaves_what_was_finished(tmp_path: Path) -> None:
    process = start("--rate", "1.5", "--num-requests", "200", "--tensor-parallel-size", "2", "--out", str(tmp_path))

    def kill_a_rank() -> None:
        while len(ranks := ranks_of(process.pid)) < 2:
            time.sleep(0.1)
        time.sleep(15)
        os.kill(ranks[1].pid, signal.SIGKILL)

    threading.Thread(target=kill_a_rank).start()
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors.count("error: rank 1 (stage 0 of 1, shard 1 of 2, ") == 1
    assert "was killed by SIGKILL" in errors
    requests = pd.read_parquet(tmp_path / "requests.parquet")
    assert set(requests["status"]) == {"finished", "failed"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["finished"] == (requests["status"] == "finished").sum()
    assert summary["failed"] == (requests["status"] == "failed").sum()
    assert json.loads((tmp_path / "meta.json").read_text())["error"].startswith("rank 1 ")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--stage-layers", "1,x"), "--stage-layers takes whole numbers"),
        (("--tensor-parallel-size", "3"), "tensor_parallel_size=3 does not divide the 4 attention heads"),
        (("--backend", "sim", "--model", "x"), "--model applies to --backend engine or http only"),
    ],
)
def test_bad_shapes(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    process = start("--rate", "1", "--out", str(tmp_path / "out"), *arguments)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert says in errors
    assert errors.count("error: ") == 1

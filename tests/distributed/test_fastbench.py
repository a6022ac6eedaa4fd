"""`fastbench run` on several ranks: the same four files, and what is left of them when a rank is lost."""

import json
import os
import signal
from pathlib import Path

import pandas as pd
import pytest

psutil = pytest.importorskip("psutil")
pytest.importorskip("torch")

from fastserve.core.console import exit_on_error  # noqa: E402
from fastserve.core.errors import FastServeError  # noqa: E402
from fastserve.engine import Job, Observer  # noqa: E402
from harness.cli import app  # noqa: E402
from harness.run.config import RunConfig  # noqa: E402
from harness.run.runner import run  # noqa: E402
from support.processes import FASTBENCH, start  # noqa: E402

PROFILE, TRACE = "a100-80g/opt-13b-tp1-swifttransformer", "fixed:prompt=16,output=40"
SIZES = {"max_batch_size": "4", "num_gpu_blocks": "100", "num_host_blocks": "20"}
COMMAND = [
    "run", "--backend", "engine", "--model", "opt-tiny", "--load-format", "dummy",
    "--policy", "fastserve", "--profile", PROFILE, "--trace", TRACE, "--torch-threads", "1",
    *(word for name, value in SIZES.items() for word in ("--set", f"{name}={value}")),
]  # fmt: skip


def test_a_run_on_two_stages(tmp_path: Path) -> None:
    arguments = ["--rate", 100, "--num-requests", 3, "--pipeline-parallel-size", 2, "--out", tmp_path]
    process = start(FASTBENCH, *COMMAND, *arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["finished"], summary["failed"]) == (3, 0)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["configuration"]["pipeline_parallel_size"] == 2
    assert meta["error"] is None


class KillARank(Observer):
    """Kill rank 1 when two requests have finished."""

    def __init__(self) -> None:
        self._num_finished = 0

    def on_done(self, job: Job) -> None:
        self._num_finished += 1
        if self._num_finished == 2:
            children = psutil.Process().children()
            (rank,) = [child for child in children if child.environ().get("RANK") == "1"]
            os.kill(rank.pid, signal.SIGKILL)


def test_a_lost_rank_leaves_what_was_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig(
        backend="engine", model="opt-tiny", load_format="dummy", profile=PROFILE, trace=TRACE, rate=5.0,
        num_requests=40, tensor_parallel_size=2, torch_threads=1, settings=SIZES,
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended, exit_on_error():
        run(config, tmp_path, observer=KillARank())
    assert ended.value.code == 2
    errors = capsys.readouterr().err
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
    with pytest.raises(FastServeError, match=says):
        app([*COMMAND, "--rate", "1", "--out", str(tmp_path / "out"), *arguments], standalone_mode=False)

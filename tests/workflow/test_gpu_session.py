"""The session for a machine with a GPU, tried out on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = ("--device", "cpu", "--dtype", "float32", "--model", "opt-tiny", "--trace", "alpaca", "--num-requests", "4")


def session(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "workflows/scripts/gpu_session.py", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("system", "workflows", ""))},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_session_stops_at_a_failure_and_goes_on_from_there(tmp_path):
    arguments = (*ON_CPU, "--rates", "8", "--out", tmp_path)
    failed = session(*arguments, "--policies", "fastserve", "sooner")
    assert failed.returncode == 1
    assert "run-sooner-rate-8: failed with status 2" in failed.stdout
    assert "sooner" in (tmp_path / "logs/run-sooner-rate-8.unfinished.log").read_text(encoding="utf-8")
    assert not (tmp_path / "logs/run-sooner-rate-8.log").exists()

    assert json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))["model"] == "opt-tiny"
    (tmp_path / "profile.json").unlink()  # Made again only if its step is carried out again.
    again = session(*arguments, "--policies", "fastserve")
    assert again.returncode == 0, again.stderr
    assert "profile: done before" in again.stdout
    assert "run-fastserve-rate-8: done before" in again.stdout
    assert not (tmp_path / "profile.json").exists()
    summary = json.loads((tmp_path / "runs/run-fastserve-rate-8/summary.json").read_text(encoding="utf-8"))
    assert (summary["policy"], summary["finished"]) == ("fastserve", 4)
    meta = json.loads((tmp_path / "runs/run-fastserve-rate-8/meta.json").read_text(encoding="utf-8"))
    assert str(tmp_path / "profile.json") in json.dumps(meta)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_what_to_do(tmp_path):
    refused = session("--out", tmp_path)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert "sees no GPU" in refused.stderr
    assert "--device cpu" in refused.stderr
    assert list(tmp_path.iterdir()) == []

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")

from fastserve.cli import app
from fastserve.errors import OutputError
from harness.runner import RunConfig, run


def test_a_measured_profile_drives_a_simulation(tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    arguments = ["profile", "--model", "opt-tiny", "--load-format", "dummy", "--repeats", "1", "--out", str(path)]
    result = CliRunner().invoke(app, [*arguments, "--max-batch-size", "4"])
    assert result.exit_code == 0, result.output
    residuals = json.loads(path.read_text())["provenance"]["residuals"]
    assert residuals["decode"]["points"] > 3
    assert all(point["measured_s"] > 0 for point in residuals["measurements"])
    summary = run(RunConfig(trace="fixed", rate=1.0, num_requests=3, profile=str(path)), tmp_path / "run")
    assert summary["finished"] == 3


def test_an_unusable_target_is_named_before_measuring(tmp_path: Path) -> None:
    arguments = ["profile", "--model", "opt-tiny", "--load-format", "dummy", "--out", str(tmp_path / "no/p.json")]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, OutputError)
    assert "existing folder" in str(result.exception)

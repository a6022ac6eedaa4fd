import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")

from fastserve.cli import app
from fastserve.errors import ConfigError, OutputError
from fastserve.latency import PrefillCurve, PrefillFit, load_profile
from fastserve.profiling import ProfileConfig, measure_profile
from harness.runner import RunConfig, run


@pytest.mark.parametrize("shape", ["--no-dense", "--dense"])
def test_a_measured_profile_drives_a_simulation(shape: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    arguments = ["profile", "--model", "opt-tiny", "--load-format", "dummy", "--repeats", "1", "--out", str(path)]
    arguments += ["--max-batch-size", "4", "--num-gpu-blocks", "96", "--num-host-blocks", "20", "--quick", shape]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for line in ("prefill ", "decode ", "mixed ", "engine ", "link "):
        assert line in result.output
    profile = load_profile(str(path))
    assert isinstance(profile.stage.prefill, PrefillCurve if shape == "--dense" else PrefillFit)
    assert len(profile.stage.decode) == (4 if shape == "--dense" else 1)
    assert profile.kv_capacity_tokens == 96 * 16
    assert profile.host_link.bandwidth_bytes_per_s > 0

    provenance = json.loads(path.read_text())["provenance"]
    residuals = provenance["residuals"]
    assert residuals["decode"]["points"] > 3
    assert all(point["measured_s"] > 0 for point in residuals["measurements"])
    assert {point["direction"] for point in provenance["host_link"]} == {"out", "in"}

    # What the engine adds is in every iteration's time, beyond the fit.
    own = provenance["engine_time"]
    assert own["policy"] == "fastserve-fcfs"
    assert own["iterations"] >= 8 + 3 * 4 - 1
    assert 0 < own["overhead_s"] + own["overhead_per_request_s"] < 0.1
    for point in residuals["measurements"]:
        if point["prefill_lens"] and point["context_lens"]:
            continue
        priced = profile.stage.iteration_time(point["prefill_lens"], point["context_lens"])
        added = own["overhead_s"] + own["overhead_per_request_s"] * len(point["context_lens"])
        assert priced == pytest.approx(point["predicted_s"] + added, rel=1e-9)

    summary = run(RunConfig(trace="fixed", rate=1.0, num_requests=3, profile=str(path)), tmp_path / "run")
    assert summary["finished"] == 3


def test_an_unusable_target_is_named_before_measuring(tmp_path: Path) -> None:
    arguments = ["profile", "--model", "opt-tiny", "--load-format", "dummy", "--out", str(tmp_path / "no/p.json")]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, OutputError)
    assert "existing folder" in str(result.exception)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size must be an integer of at least 1, got 0"),
        ({"token_budget": 0}, "token_budget must be an integer of at least 1, got 0"),
        ({"repeats": 0}, "repeats must be an integer of at least 1, got 0"),
        ({"load_format": "auto"}, "use load_format dummy"),
    ],
)
def test_bad_input_is_named_before_anything_is_measured(wrong: dict[str, object], message: str) -> None:
    config = ProfileConfig(**{"model": "opt-tiny", "load_format": "dummy", **wrong})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        measure_profile(config, "x", lambda steps: pytest.fail("measured"))

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")

from fastserve.cli import app
from fastserve.core.config import EngineOptions, ModelSource
from fastserve.core.errors import ConfigError, OutputError
from fastserve.core.options import option_names
from fastserve.core.parallel import ParallelConfig
from fastserve.latency import AllReduce, DecodeFit, FittedLatency, MeasuredRange, PrefillCurve, PrefillFit, load_profile
from fastserve.profiling.config import ProfileConfig
from fastserve.profiling.measure import _without_all_reduces, measure_profile
from harness.run.config import RunConfig
from harness.run.runner import run


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

    shapes = [(point["prefill_lens"], point["context_lens"]) for point in residuals["measurements"]]
    assert profile.measured_range == MeasuredRange.spanned(shapes)
    assert profile.kind == "fitted"

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


@pytest.mark.parametrize(("shards", "stages"), [(2, 1), (1, 2)])
def test_a_profile_of_several_ranks_drives_a_simulation(shards: int, stages: int, tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    arguments = ["profile", "--model", "opt-tiny", "--load-format", "dummy", "--repeats", "1", "--out", str(path)]
    arguments += ["--max-batch-size", "4", "--num-gpu-blocks", "96", "--num-host-blocks", "20", "--quick"]
    arguments += ["--tensor-parallel-size", str(shards), "--pipeline-parallel-size", str(stages)]
    if stages > 1:
        arguments += ["--stage-layers", "1,1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    profile = load_profile(str(path))
    assert (profile.tensor_parallel_size, profile.pipeline_parallel_size) == (shards, stages)
    assert profile.kv_capacity_tokens == 96 * 16
    assert profile.host_link.bandwidth_bytes_per_s > 0
    assert len(profile.later_stages) == stages - 1
    assert (profile.stage_link is not None) == (stages > 1)
    assert "channel " in result.output
    assert ("sums " in result.output, "sends " in result.output) == (shards > 1, stages > 1)

    # What the engine and the control channel add is in the first stage, the all-reduces are in each, apart or not.
    provenance = json.loads(path.read_text())["provenance"]
    assert sum(provenance["stage_layers"]) == 2
    assert provenance["backend"] == "gloo"
    assert [point["bytes"] for point in provenance["all_reduce" if shards > 1 else "stage_link"]][:2] == [256, 1024]
    own = provenance["engine_time"]
    assert own["iterations"] >= 8 + 3 * 4 - 1
    all_residuals = [provenance["residuals"], *provenance["later_residuals"]]
    for stage, (priced_by, of_stage) in enumerate(zip(profile.stages, all_residuals, strict=True)):
        for point in of_stage["measurements"]:
            if point["prefill_lens"] and point["context_lens"]:
                continue
            priced = priced_by.iteration_time(point["prefill_lens"], point["context_lens"])
            added = 0.0
            if stage == 0:
                added = own["overhead_s"] + own["overhead_per_request_s"] * len(point["context_lens"])
                added += provenance["channel_s"]
            assert priced == pytest.approx(point["predicted_s"] + added, rel=1e-9)

    summary = run(RunConfig(trace="fixed", rate=1.0, num_requests=3, profile=str(path)), tmp_path / "run")
    assert summary["finished"] == 3


def test_all_reduces_are_taken_out_of_a_stage_where_something_is_left() -> None:
    stages = [FittedLatency(PrefillFit(2e-3, 1e-5, 0.0), (DecodeFit(1e-3, 1e-6, 1e-5),))] * 2
    shapes = [((16,), ()), ((), (8, 8))]
    cheap = AllReduce(1e-5, 1e9, 256, (3, 2))
    all_reduce, pure = _without_all_reduces(stages, cheap, shapes)
    assert all_reduce is cheap
    for i, (stage, without) in enumerate(zip(stages, pure, strict=True)):
        for shape in shapes:
            assert without.iteration_time(*shape) < stage.iteration_time(*shape)
            both = without.plus(*cheap.of_stage(i))
            assert both.iteration_time(*shape) == pytest.approx(stage.iteration_time(*shape))
    assert _without_all_reduces(stages, AllReduce(1e-3, 1e9, 256, (3, 2)), shapes) == (None, stages)


def test_stage_layers_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    arguments = ["profile", "--model", "opt-tiny", "--load-format", "dummy", "--out", str(tmp_path / "p.json")]
    result = CliRunner().invoke(app, [*arguments, "--stage-layers", "1;1"])
    assert isinstance(result.exception, ConfigError)
    assert "'1;1'" in str(result.exception)


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
        ({"pipeline_parallel_size": 2, "stage_layers": (3, 2)}, "5 layers in all"),
        ({"pipeline_parallel_size": 99}, "a stage needs one at least"),
        ({"tensor_parallel_size": 3}, "does not divide"),
    ],
)
def test_bad_input_is_named_before_anything_is_measured(wrong: dict[str, Any], message: str) -> None:
    given = {"model": "opt-tiny", "load_format": "dummy", **wrong}

    def measure() -> None:
        source, sizes, parallel = (
            part(**{name: value for name, value in given.items() if name in option_names(part)})
            for part in (ModelSource, EngineOptions, ParallelConfig)
        )
        config = ProfileConfig(source, sizes, given.get("repeats", 3), parallel=parallel)
        measure_profile(config, "x", lambda steps: pytest.fail("measured"))

    with pytest.raises(ConfigError, match=message):
        measure()

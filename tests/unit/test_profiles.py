"""The shipped profiles: which there are, that the script makes them, and that the documentation shows its tables."""

from dataclasses import replace
from pathlib import Path

import pytest

from fastserve.core.errors import ConfigError
from fastserve.core.presets import preset
from fastserve.latency import MeasuredRange, PipelinedLatency, list_profiles, load_profile
from tools import make_profiles

ROOT = Path(__file__).parents[2]
DERIVED = {
    f"{folder}/{case}{suffix}"
    for folder, cases in {
        "a100-40g": ("opt-13b-tp1", "opt-66b-tp4", "opt-66b-tp2-pp2", "opt-175b-tp8-pp2", "llama-3-8b-tp1"),
        "a100-80g": ("opt-66b-tp2-pp2", "opt-175b-tp8-pp2", "llama-3-8b-tp1"),
    }.items()
    for case in cases
    for suffix in ("", "-vllm")
}


def test_which_profiles_are_shipped() -> None:
    names = set(list_profiles())
    assert names >= DERIVED
    # Measured: 7 of SwiftTransformer and 7 of vLLM, less the one that is a bad fit.
    assert len(names - DERIVED) == 13
    assert "a100-80g/opt-66b-tp2-vllm" not in names


def test_the_script_makes_the_profiles_that_are_shipped() -> None:
    made = {profile.name: profile for profile in make_profiles.derived_profiles(make_profiles.load_measured())}
    assert set(made) == DERIVED
    for name, profile in made.items():
        shipped = load_profile(name)
        for shape in (((128,), ()), ((1024,), ()), ((), (1,)), ((), (500,) * 64), ((), (500,) * 128)):
            assert shipped.stage.iteration_time(*shape) == pytest.approx(profile.stage.iteration_time(*shape), rel=1e-9)
        for key in ("model", "hardware", "engine", "kv_capacity_tokens", "host_link", "stage_link", "measured_range", "kind"):
            assert getattr(shipped, key) == getattr(profile, key)
        assert set(shipped.provenance) == set(profile.provenance)


def test_the_documentation_shows_the_scripts_tables() -> None:
    page = (ROOT / "docs/calibration.md").read_text(encoding="utf-8")
    for title, lines in make_profiles.tables().items():
        assert "\n".join(lines) in page, f"table {title}: run python tools/make_profiles.py --check"


@pytest.mark.parametrize("name", sorted(DERIVED))
def test_a_derived_profile_says_where_it_comes_from(name: str) -> None:
    profile = load_profile(name)
    assert {"source", "method", "error", "kv_capacity", "host_link", "mixed_iterations"} <= set(profile.provenance)
    assert "measured" not in profile.provenance
    num_gpus = profile.tensor_parallel_size * profile.pipeline_parallel_size
    assert profile.host_link.bandwidth_bytes_per_s == num_gpus * 25e9
    assert profile.kv_capacity_tokens % 16 == 0


@pytest.mark.parametrize(
    ("name", "kind", "measured"),
    [
        ("a100-80g/opt-13b-tp1", "fitted", MeasuredRange(prompt_tokens=2048, context_tokens=2048)),
        ("a100-40g/opt-66b-tp4-vllm", "fitted", MeasuredRange(prompt_tokens=2048, context_tokens=2048)),
        ("a100-40g/opt-66b-tp2-pp2", "fitted", MeasuredRange(prompt_tokens=2048, context_tokens=2048)),
        ("a100-40g/opt-66b-tp2-pp2-vllm", "roofline", MeasuredRange(2048, 2048, 64, 1024)),
        ("a100-80g/llama-3-8b-tp1", "roofline", MeasuredRange(2048, 2048, 64, 1024)),
    ],
)
def test_a_profile_says_what_it_was_measured_for(name: str, kind: str, measured: MeasuredRange) -> None:
    profile = load_profile(name)
    assert (profile.kind, profile.measured_range) == (kind, measured)
    assert profile.provenance["range"]


def test_the_range_of_measured_iterations() -> None:
    shapes = [((100, 300), ()), ((64,), (500, 20, 7)), ((), (9,) * 5)]
    assert MeasuredRange.spanned(shapes) == MeasuredRange(400, 300, 5, 500)
    assert MeasuredRange.spanned([((10,), ())]) == MeasuredRange(10, 10, None, None)


def test_capacity_on_40_gb() -> None:
    # The paper leaves about 12,000 tokens for OPT-13B.
    assert load_profile("a100-40g/opt-13b-tp1").kv_capacity_tokens == pytest.approx(12_000, rel=0.05)
    for name in (name for name in DERIVED if name.startswith("a100-40g/")):
        profile, config = load_profile(name), preset(load_profile(name).model)
        num_gpus = profile.tensor_parallel_size * profile.pipeline_parallel_size
        left = num_gpus * 36e9 - 2 * config.num_parameters() - profile.kv_capacity_tokens * profile.kv_bytes_per_token
        assert 0 <= left < 16 * profile.kv_bytes_per_token


def test_capacity_on_80_gb_is_the_published_one() -> None:
    assert load_profile("a100-80g/opt-66b-tp2-pp2").kv_capacity_tokens == 78_512
    assert load_profile("a100-80g/opt-175b-tp8-pp2-vllm").kv_capacity_tokens == 192_784


@pytest.mark.parametrize("name", sorted(name for name in list_profiles() if name.startswith("a100-40g/")))
def test_less_bandwidth_is_slower_and_by_no_more_than_its_ratio(name: str) -> None:
    slow, fast = load_profile(name).latency, load_profile(name.replace("40g", "80g")).latency
    for shape in (((8,), ()), ((1024,), ()), ((), (500,)), ((), (500,) * 64)):
        assert 1 < slow.iteration_time(*shape) / fast.iteration_time(*shape) < 2.04 / 1.555


def test_a_stage_of_a_measured_model_takes_its_share() -> None:
    whole, half = load_profile("a100-80g/opt-66b-tp2"), load_profile("a100-80g/opt-66b-tp2-pp2")
    for shape in (((512,), ()), ((), (500,) * 16), ((), (500,) * 100)):
        assert half.stage.iteration_time(*shape) == pytest.approx(whole.stage.iteration_time(*shape) / 2)
    assert isinstance(half.latency, PipelinedLatency)


def test_stages_send_over_the_link_between_them() -> None:
    within, between = load_profile("a100-40g/opt-66b-tp2-pp2"), load_profile("a100-40g/opt-175b-tp8-pp2")
    assert within.stage_link is not None
    assert between.stage_link is not None
    # Vidur's profiles: 16 MiB take 65 us within a node and 2,198 between.
    assert within.stage_link.transfer_time(910) == pytest.approx(65e-6, rel=0.3)
    assert between.stage_link.transfer_time(683) == pytest.approx(2198e-6, rel=0.05)


def test_the_context_is_that_of_the_profiles_model(tmp_path: Path) -> None:
    opt, llama = load_profile("a100-80g/opt-66b-tp4"), load_profile("a100-80g/llama-3-8b-tp1")
    assert (opt.max_model_len, llama.max_model_len) == (2048, 8192)
    assert replace(opt, model="of-someone").max_model_len is None
    measured = replace(opt, model="of-someone", context_tokens=512)
    measured.save(tmp_path / "measured.json")
    assert load_profile(str(tmp_path / "measured.json")).max_model_len == 512
    with pytest.raises(ConfigError, match="context_tokens must be an integer of at least 2, got 1"):
        replace(opt, context_tokens=1)

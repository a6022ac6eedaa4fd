"""The shipped profiles: which there are, that the script makes them, and that the documentation shows its tables."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastserve.core.errors import ConfigError
from fastserve.core.presets import preset
from fastserve.latency import (
    EngineTime,
    KernelLatency,
    MeasuredRange,
    PipelinedLatency,
    Profile,
    list_profiles,
    load_profile,
)
from fastserve.latency.calibration import difference_as_engine_time
from harness.cli import app
from tools import make_profiles
from tools.make_profiles import Case

ROOT = Path(__file__).parents[2]
DERIVED = {
    "a100-80g/opt-66b-tp2-pp2-swifttransformer",
    *(f"a100-80g/{case}-vllm" for case in ("opt-66b-tp2-pp2", "opt-175b-tp8-pp2", "llama-3-8b-tp1")),
}
ON_40G = sorted(make_profiles.names_on_40g())
KERNELS = sorted([*make_profiles.NAMES, *ON_40G])
SHAPES = (((128,), ()), ((1024,), ()), ((), (1,)), ((), (500,) * 64), ((), (500,) * 128), ((300,), (500,) * 30))


def test_which_profiles_are_shipped() -> None:
    names = set(list_profiles())
    with_engine_time = {f"artifact-{name}" for name in make_profiles.ARTIFACT}
    assert names >= DERIVED | set(KERNELS) | with_engine_time
    # Measured by others: 7 of SwiftTransformer and 7 of vLLM, less the one that is a bad fit.
    fits = names - DERIVED - set(KERNELS) - with_engine_time
    assert len(fits) == 13
    assert all(name.endswith(("-swifttransformer", "-vllm")) for name in fits)
    assert "a100-80g/opt-66b-tp2-vllm" not in names


def test_the_script_makes_the_profiles_that_are_shipped() -> None:
    made = {profile.name: profile for profile in make_profiles.derived_profiles(make_profiles.load_measured())}
    assert set(made) == DERIVED
    for name, profile in made.items():
        assert_same(load_profile(name), profile)


def assert_same(shipped: Profile, made: Profile) -> None:
    for shape in SHAPES:
        assert shipped.latency.iteration_time(*shape) == pytest.approx(made.latency.iteration_time(*shape), rel=1e-9)
    keys = ("model", "hardware", "engine", "kv_capacity_tokens", "host_link", "stage_link", "measured_range", "kind")
    for key in (*keys, "known_error", "engine_time"):
        assert getattr(shipped, key) == getattr(made, key)
    assert set(shipped.provenance) == set(made.provenance)


def test_fastbench_shows_what_is_known_of_each_profile() -> None:
    lines = CliRunner().invoke(app, ["profiles"]).output.splitlines()
    assert lines[0].split() == ["profile", "kind", "cache", "iteration", "prompt", "decodes", "context"]
    shown = {lines[i].split()[0]: lines[i : i + 3] for i in range(1, len(lines), 3)}
    assert list(shown) == list_profiles()
    rows = {name: " ".join(row.split()[1:]) for name, (row, *_) in shown.items()}
    assert rows["l40s/llama-3.1-8b-tp1"].startswith("measured kernels 193,888 8,192 16,384 2,048 ")
    assert rows["a100-80g/opt-13b-tp1-vllm"] == "fitted 66,144 - 2,048 - 2,048"
    assert rows["a100-80g/opt-66b-tp2-pp2-vllm"].startswith("roofline 78,512 ")
    assert "LLMServingSim, commit 5daddb2" in shown["rtx4090/llama-3.1-8b-tp1"][1]
    assert "against a100-80g/opt-13b-tp1-swifttransformer: decode" in shown["a100-80g/opt-13b-tp1"][2]
    assert "the source publishes coefficients only" in shown["a100-80g/opt-13b-tp1-vllm"][2]


@pytest.mark.parametrize("name", KERNELS)
def test_a_profile_of_kernels_says_where_it_comes_from(name: str) -> None:
    profile = load_profile(name)
    assert profile.kind == "measured kernels"
    assert isinstance(profile.stage, KernelLatency)
    assert profile.measured_range == profile.stage.tables.range
    assert {"source", "method", "error", "kv_capacity", "host_link", "mixed_iterations"} <= set(profile.provenance)
    licensed = "LLMServingSim, commit 5daddb2 (casys-kaist, MIT)", "aiconfigurator 0.8.0 (NVIDIA, Apache-2.0)"
    assert profile.provenance["source"].startswith(licensed)
    assert profile.model == name.partition("/")[2].partition("-tp")[0]
    assert profile.hardware == make_profiles.A100_40G.name or name not in ON_40G
    assert (profile.max_model_len or 0) == preset(profile.model).max_model_len
    assert profile.kv_capacity_tokens % 16 == 0
    assert not any("/tmp" in str(value) or "/work" in str(value) for value in profile.provenance.values())


@pytest.mark.parametrize("name", KERNELS)
def test_times_of_kernels_rise_with_the_work_and_fall_with_the_gpu(name: str) -> None:
    """Measured times have noise of some percent, and cuBLAS may take a better kernel for more tokens."""
    latency = load_profile(name).latency
    prompts = [latency.iteration_time((length,), ()) for length in (1, 64, 256, 1024, 2048)]
    decodes = [latency.iteration_time((), (512,) * batch) for batch in (1, 8, 64, 256)]
    contexts = [latency.iteration_time((), (context,) * 16) for context in (16, 256, 1024, 4096)]
    for times in (prompts, decodes, contexts):
        assert all(later > 0.95 * earlier for earlier, later in itertools.pairwise(times))
        assert times[-1] > times[0]
    # A GPU cannot read the weights of a shard faster than its memory's bandwidth.
    bandwidth = {"a100-40g": 1.555e12, "a100-80g": 2.04e12,
                 "h100": 3.35e12, "h200": 4.8e12, "l40s": 0.864e12, "rtx4090": 1.008e12,
                 "rtxpro6000": 1.597e12}[name.partition("/")[0]]  # fmt: skip
    profile, config = load_profile(name), preset(load_profile(name).model)
    read = 2 * (config.num_parameters() - config.vocab_size * config.hidden_size) / profile.tensor_parallel_size
    assert decodes[0] > 0.9 * read / bandwidth  # Some of a small matrix stays in the L2 cache between measurements.


def test_opt_13b_by_kernels_is_near_the_measured_fit() -> None:
    kernels, fit = load_profile("a100-80g/opt-13b-tp1"), load_profile("a100-80g/opt-13b-tp1-swifttransformer")
    for batch in (1, 4, 16, 32):
        shape = ((), (512,) * batch)
        assert kernels.latency.iteration_time(*shape) == pytest.approx(fit.latency.iteration_time(*shape), rel=0.1)
    for length in (512, 1024, 2048):
        ratio = kernels.latency.iteration_time((length,), ()) / fit.latency.iteration_time((length,), ())
        assert 0.75 < ratio < 0.85


def test_a_pipeline_of_kernels_has_its_head_in_the_last_stage() -> None:
    profile = load_profile("a100-80g/opt-66b-tp2-pp2")
    assert isinstance(profile.stage, KernelLatency)
    (last,) = profile.later_stages
    assert isinstance(last, KernelLatency)
    assert profile.stage.tables.per_sequence is None
    assert last.tables.per_sequence is not None
    assert profile.stage_link == load_profile("a100-80g/opt-66b-tp2-pp2-swifttransformer").stage_link


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
        ("a100-80g/opt-13b-tp1-swifttransformer", "fitted", MeasuredRange(prompt_tokens=2048, context_tokens=2048)),
        ("a100-80g/opt-66b-tp4-vllm", "fitted", MeasuredRange(prompt_tokens=2048, context_tokens=2048)),
        ("a100-80g/opt-66b-tp2-pp2-swifttransformer", "fitted", MeasuredRange(None, 2048, None, 2048)),
        ("a100-80g/opt-66b-tp2-pp2-vllm", "roofline", MeasuredRange(None, 2048, 64, 1024)),
        ("a100-80g/llama-3-8b-tp1-vllm", "roofline", MeasuredRange(None, 2048, 64, 1024)),
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


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("opt-13b-tp1", 14_576), ("opt-66b-tp4", 6_880), ("opt-66b-tp2-pp2", 6_880), ("opt-175b-tp8-pp2", 49_536),
     ("llama-3-8b-tp1", 180_368)],
)  # fmt: skip
def test_capacity_on_40_gb_is_the_artifacts(name: str, tokens: int) -> None:
    with_own_time = {f"artifact-a100-40g/{name}"} & set(list_profiles())  # Not of every model.
    for shipped in (f"a100-40g/{name}", f"a100-40g/{name}-vllm", *with_own_time):
        assert load_profile(shipped).kv_capacity_tokens == tokens


@pytest.mark.parametrize("case", make_profiles.ON_40G, ids=lambda case: case.name)
def test_what_the_artifacts_formula_leaves_fits_beside_the_weights(case: Case) -> None:
    config, gpus = preset(case.model), case.shards * case.stages
    tokens = make_profiles.artifact_cache_tokens(config, case.shards, case.stages)
    assert load_profile(f"a100-40g/{case.name}").kv_capacity_tokens == tokens
    counted = make_profiles.artifact_weight_bytes(config, case.shards, case.stages)
    if config.architecture == "opt":  # Every GPU has the embeddings and 5 vectors a layer, which we do not count.
        assert counted == pytest.approx(2 * config.num_parameters() / gpus, rel=0.06)
    else:
        assert counted < 2 * config.num_parameters()
    in_memory = gpus * max(counted, 2 * config.num_parameters() / gpus) + tokens * config.kv_bytes_per_token()
    assert in_memory < 0.95 * gpus * make_profiles.A100_40G.memory_bytes
    block = 16 * config.kv_bytes_per_token() / gpus
    assert 0 <= 0.89 * 42.3e9 - counted - tokens / 16 * block < block


def test_capacity_on_80_gb_is_the_published_one() -> None:
    assert load_profile("a100-80g/opt-66b-tp2-pp2-swifttransformer").kv_capacity_tokens == 78_512
    assert load_profile("a100-80g/opt-175b-tp8-pp2-vllm").kv_capacity_tokens == 192_784


@pytest.mark.parametrize("case", make_profiles.ON_40G, ids=lambda case: case.name)
def test_less_bandwidth_slows_what_reads_memory(case: Case) -> None:
    """By no more than its ratio; prompts, which compute, by little."""
    slow, fast = load_profile(f"a100-40g/{case.name}"), load_profile(f"a100-80g/{case.name}")
    ratio = 2.039 / 1.555
    for shape in (((8,), ()), ((512,), ()), ((1024,), ()), ((), (500,)), ((), (500,) * 64), ((200,), (500,) * 64)):
        assert 1 < slow.latency.iteration_time(*shape) / fast.latency.iteration_time(*shape) < 1.005 * ratio
    assert isinstance(slow.stage, KernelLatency)
    assert isinstance(fast.stage, KernelLatency)
    before, after = fast.stage.tables, slow.stage.tables
    assert after.prompts == before.prompts
    assert after.dense.at == before.dense.at
    assert after.dense.seconds[-1] == pytest.approx(before.dense.seconds[-1], rel=0.03)
    # A large batch of long contexts reads its cache; one of short contexts takes what launching it takes.
    longest = [dict(tables.decode)[1].seconds[-1] for tables in (before, after)]
    assert 1.25 < longest[1] / longest[0] <= ratio
    shortest = [min(min(curve.seconds) for _, curve in tables.decode) for tables in (before, after)]
    assert shortest[1] == pytest.approx(shortest[0], rel=0.02)


@pytest.mark.parametrize("case", make_profiles.ON_40G, ids=lambda case: case.name)
def test_vllm_on_40_gb_is_the_same_kernels_and_its_own_time(case: Case) -> None:
    plain, shipped = load_profile(f"a100-40g/{case.name}"), load_profile(f"a100-40g/{case.name}-vllm")
    assert plain.engine_time.is_zero
    assert shipped.engine_time.source == "fitted"
    assert_same(shipped, make_profiles.with_time_of_vllm(plain, case, make_profiles.load_measured()))


def test_the_difference_of_two_engines_is_found_where_it_is_one() -> None:
    swift = load_profile("a100-80g/opt-13b-tp1-swifttransformer")
    own = EngineTime(3e-3, 2e-5, 4e-5, source="fitted")
    found = difference_as_engine_time(replace(swift, engine_time=own), swift)
    for name in ("per_iteration_s", "per_request_s", "per_token_s"):
        assert getattr(found, name) == pytest.approx(getattr(own, name), rel=1e-6)
    assert difference_as_engine_time(swift, swift).is_zero


def test_a_stage_of_a_measured_model_takes_its_share() -> None:
    whole, half = (
        load_profile("a100-80g/opt-66b-tp2-swifttransformer"),
        load_profile("a100-80g/opt-66b-tp2-pp2-swifttransformer"),
    )
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
    opt, llama = load_profile("a100-80g/opt-66b-tp4-swifttransformer"), load_profile("a100-80g/llama-3-8b-tp1")
    assert (opt.max_model_len, llama.max_model_len) == (2048, 8192)
    assert replace(opt, model="of-someone").max_model_len is None
    measured = replace(opt, model="of-someone", context_tokens=512)
    measured.save(tmp_path / "measured.json")
    assert load_profile(str(tmp_path / "measured.json")).max_model_len == 512
    with pytest.raises(ConfigError, match="context_tokens must be an integer of at least 2, got 1"):
        replace(opt, context_tokens=1)

"""Kernel tables by layer: what is made of them, and what is refused, with file, row and remedy."""

import csv
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastserve.core.errors import ConfigError
from fastserve.core.parallel import ParallelConfig
from fastserve.core.presets import preset
from fastserve.latency import KernelLatency, Profile, load_profile
from fastserve.profiling.kernels.importing import import_profile

MODEL = preset("llama-3.1-8b")
META: dict[str, Any] = {
    "vllm_version": "0.19.0",
    "cuda_version": "12.8",
    "profiled_at": "2026-08-17",
    "gpu": "NVIDIA GeForce RTX 4090",
    "model": "meta-llama/Llama-3.1-8B",
    "variant": "bf16",
    "tp_degrees": [1],
    "engine_effective": {
        "hf_overrides": {
            "num_hidden_layers": 1,
            "intermediate_size": 14_336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
        }
    },
}
LAYERS = {
    "qkv_proj": 50.0, "o_proj": 40.0, "gate_up_proj": 250.0, "down_proj": 125.0, "layernorm": 2.0, "act_fn": 3.0,
    "embedding": 5.0, "final_layernorm": 2.5,
}  # fmt: skip
"""Microseconds at one token; at 512 three times as many."""
ATTENTION = [
    (0, 0, 1, 16, 9), (0, 0, 1, 1024, 14), (0, 0, 64, 16, 30), (0, 0, 64, 1024, 200),
    (16, 0, 0, 0, 10), (512, 0, 0, 0, 60), (512, 1024, 0, 0, 90),
    (16, 0, 1, 16, 12), (16, 0, 64, 1024, 210), (512, 0, 1, 16, 62), (512, 1024, 64, 1024, 280),
]  # fmt: skip


def write(path: Path, header: str, rows: list[tuple[Any, ...]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header.split(","), *rows])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tables(tmp_path)
    return tmp_path


def write_tables(folder: Path, scale: float = 1.0) -> None:
    folder.mkdir(exist_ok=True)
    write_meta(folder, META)
    dense = [
        (name, tokens, scale * time * factor) for name, time in LAYERS.items() for tokens, factor in ((1, 1), (512, 3))
    ]
    write(folder / "dense.csv", "layer,tokens,time_us", dense)
    sequences = [("lm_head", 1, 1000.0), ("lm_head", 64, 1200.0), ("sampler", 1, 25.0), ("sampler", 64, 45.0)]
    write(folder / "per_sequence.csv", "layer,sequences,time_us", sequences)
    rows = [(*numbers, scale * time) for *numbers, time in ATTENTION]
    write(folder / "attention.csv", "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us", rows)


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    (folder / "meta.yaml").write_text(yaml.safe_dump(meta))


def profile_of(folder: Path, model: str = "llama-3.1-8b", shards: int = 1, memory_gb: float | None = None) -> Profile:
    return import_profile(str(folder), preset(model), ParallelConfig(shards), "mine", memory_gb)


def dense_s(tokens: int) -> float:
    """Of 32 layers by hand, the norm twice a layer, embedding and last norm once."""
    layer = 50 + 40 + 250 + 125 + 2 * 2 + 3
    return (32 * layer + 5 + 2.5) * 1e-6 * {1: 1, 512: 3}[tokens]


def test_times_are_the_measured_ones_at_measured_points(folder: Path) -> None:
    latency = profile_of(folder).latency
    for sequences, context, attention_us in ((1, 16, 9), (1, 1024, 14)):
        expected = dense_s(1) + (1000 + 25) * 1e-6 + 32 * attention_us * 1e-6
        assert latency.iteration_time((), (context,) * sequences) == pytest.approx(expected, rel=1e-5)
    assert latency.iteration_time((512,), ()) == pytest.approx(dense_s(512) + 1025e-6 + 32 * 60e-6, rel=1e-5)
    assert latency.iteration_time((512,), (), (1024,)) == pytest.approx(dense_s(512) + 1025e-6 + 32 * 90e-6, rel=1e-5)


def test_an_iteration_of_both_takes_its_measured_attention(folder: Path) -> None:
    latency = profile_of(folder).latency
    dense = dense_s(1) + 16 * (dense_s(512) - dense_s(1)) / 511
    expected = dense + (1025 + 220 / 63) * 1e-6 + 32 * 12e-6
    assert latency.iteration_time((16,), (16,)) == pytest.approx(expected, rel=1e-5)


def test_a_profile_says_what_it_is_of(folder: Path, tmp_path: Path) -> None:
    profile = profile_of(folder)
    assert (profile.kind, profile.dtype, profile.hardware) == ("measured kernels", "bfloat16", META["gpu"])
    assert profile.engine == "kernels of vLLM 0.19.0"
    assert profile.max_model_len == 131_072
    assert profile.measured_range is not None
    assert (profile.measured_range.iteration_tokens, profile.measured_range.decodes) == (512, 64)
    # 0.9 of 24 GiB less 16.06 GB of weights and 2 GB, at 131,072 bytes a token.
    free = 0.9 * 24 * 2**30 - 2 * MODEL.num_parameters() - 2e9
    assert profile.kv_capacity_tokens == int(free / 131_072) // 16 * 16
    profile.save(tmp_path / "mine.json")
    read = load_profile(str(tmp_path / "mine.json"))
    assert read.stage == profile.stage
    assert read.kind == "measured kernels"


def test_layers_may_differ_in_number(folder: Path) -> None:
    half = replace(MODEL, num_layers=16)
    profile = import_profile(str(folder), half, ParallelConfig(), "half")
    assert isinstance(profile.stage, KernelLatency)
    assert profile.stage.tables.dense.seconds[0] == pytest.approx((16 * 472 + 7.5) * 1e-6)


def test_sizes_are_in_folders(tmp_path: Path) -> None:
    overrides = {"intermediate_size": 7168, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 64_128}
    meta = META | {
        "tp_degrees": [1, 2],
        "engine_effective": {"hf_overrides": overrides},  # Of the shard that was profiled last.
        "skew_fit": {"per_tp": {1: {"alpha_default": 0.0543}, 2: {"alpha_default": 0.0654}}},
    }
    for size in (1, 2):
        write_tables(tmp_path / f"tp{size}", scale=1 / size)
        (tmp_path / f"tp{size}/meta.yaml").unlink()
    write_meta(tmp_path, meta)
    one, two = (profile_of(tmp_path, shards=size) for size in (1, 2))
    assert isinstance(one.stage, KernelLatency)
    assert isinstance(two.stage, KernelLatency)
    assert one.stage.tables.dense.seconds[0] == pytest.approx(2 * two.stage.tables.dense.seconds[0])
    assert (one.stage.tables.unequal_contexts, two.stage.tables.unequal_contexts) == (0.0543, 0.0654)
    assert "no all-reduces" in two.provenance["warnings"][0]
    assert "warnings" not in one.provenance
    with pytest.raises(ConfigError, match=r"tensor_parallel_size is 4, and the tables are of 1, 2 \(tp_degrees\)"):
        profile_of(tmp_path, shards=4)


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def changed(key: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: write_meta(folder, META | {key: value})


def table(name: str, old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: replaced(folder / name, old, new)


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (lambda folder: (folder / "dense.csv").unlink(), r"dense\.csv does not exist\. Give the folder"),
    (lambda folder: (folder / "meta.yaml").unlink(), r"meta\.yaml does not exist\. Give the folder"),
    (table("meta.yaml", "gpu:", "gpu: ["), r"meta\.yaml cannot be read as YAML"),
    (table("dense.csv", "time_us", "time"), r"dense\.csv, row 1: no column 'time_us'; it has layer, tokens, time"),
    (table("dense.csv", "qkv_proj,1,50.0", "qkv_proj,1"), r"dense\.csv, row 2: 2 values, the header names 3"),
    (table("dense.csv", "qkv_proj,1,50.0", "qkv_proj,1,nan"), r"row 2: time_us is 'nan'; a measured time is above 0"),
    (table("dense.csv", "qkv_proj,1,50.0", "qkv_proj,1,-5"), r"row 2: time_us is '-5'; a measured time is above 0"),
    (table("dense.csv", "qkv_proj,1,", "qkv_proj,1.5,"), r"row 2: tokens is '1\.5'; it must be a whole number"),
    (table("dense.csv", "qkv_proj,512,", "qkv_proj,1,"), r"dense\.csv, row 3: this point is in the table twice"),
    (table("dense.csv", "o_proj,512,", "o_proj,256,"), "o_proj and qkv_proj have other numbers of tokens, such as 256"),
    (table("per_sequence.csv", "sampler,1,25.0\nsampler,64,45.0\n", ""), "no row of layer 'sampler'"),
    (table("per_sequence.csv", "sampler,64", "sampler,32"), "sampler has other numbers of sequences, such as 32"),
    (table("attention.csv", "0,0,1,16,", "0,0,0,0,"), r"attention\.csv, row 2: prefill_chunk and n_decode are both 0"),
    (table("attention.csv", "0,0,1,16,", "0,0,1,0,"), r"row 2: n_decode is 1 and kv_decode 0"),
    (table("attention.csv", "0,0,1,16,", "0,7,1,16,"), r"row 2: kv_prefill is 7 without a chunk"),
    (table("attention.csv", "0,0,1,1024,", "0,0,1,16,"), r"attention\.csv, row 3: this point is in the table twice"),
    (table("attention.csv", "16,0,0,0,", "16,64,0,0,"), "no row with prefill_chunk 16, kv_prefill 0, n_decode 0"),
    (changed("tp_degrees", [2]), "whose intermediate_size is 28672; model llama-3.1-8b has 14336"),
    (changed("tp_degrees", "1"), r"tp_degrees is '1'; it must be a list of numbers of shards"),
    (changed("gpu", "NVIDIA B300"), r"meta\.yaml: GPU 'NVIDIA B300' is not known.*give --gpu-memory-gb"),
    (changed("variant", "fp8"), r"variant is 'fp8'; tables are read of bf16 and fp16 only"),
    (changed("vllm_version", None), r"vllm_version is None; it must be a text"),
    (changed("engine_effective", {}), r"hf_overrides must have numbers for intermediate_size"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), FAULTS, ids=[message[:40] for _, message in FAULTS])
def test_wrong_tables_are_refused(spoil: Callable[[Path], None], message: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(ConfigError, match=message):
        profile_of(folder)


def without(kind: str) -> list[tuple[int, ...]]:
    keep = {
        "prompts": lambda row: row[2],
        "decodes": lambda row: row[0],
        "one decode": lambda row: row[0] or row[2] > 1,
    }
    return [row for row in ATTENTION if keep[kind](row)]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("prompts", "no row with n_decode 0, chunks of prompts alone; profile them too"),
        ("decodes", "no row with prefill_chunk 0, decodes alone; profile them too"),
        ("one decode", "no row with prefill_chunk 0 and n_decode 1, one decode alone"),
    ],
)
def test_holes_are_refused(kind: str, message: str, folder: Path) -> None:
    write(folder / "attention.csv", "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us", without(kind))
    with pytest.raises(ConfigError, match=message):
        profile_of(folder)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_another_unit_is_refused(scale: float, tmp_path: Path) -> None:
    write_tables(tmp_path, scale)
    with pytest.raises(ConfigError, match=r"one token takes .* s in one layer.*times must be in microseconds"):
        profile_of(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("llama-3.1-70b", "whose intermediate_size is 14336; model llama-3.1-70b has 28672"),
        ("qwen3-32b", "whose intermediate_size is 14336; model qwen3-32b has 25600"),
        ("llama-2-7b", "whose intermediate_size is 14336; model llama-2-7b has 11008"),
    ],
)
def test_a_model_of_other_shapes_is_refused(model: str, message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        profile_of(folder, model)


def test_a_model_that_does_not_fit_is_refused_with_the_numbers(folder: Path) -> None:
    message = "does not fit NVIDIA GeForce RTX 4090.*16.1 GB of weights, and 0.9 of 16.0 GB less 2 GB are 12.4 GB"
    with pytest.raises(ConfigError, match=message):
        profile_of(folder, memory_gb=16.0)
    with pytest.raises(ConfigError, match="--gpu-memory-gb must be"):
        profile_of(folder, memory_gb=0.0)


def test_an_unknown_gpu_takes_the_memory_given(folder: Path) -> None:
    write_meta(folder, META | {"gpu": "NVIDIA B300"})
    profile = profile_of(folder, memory_gb=288.0)
    assert profile.hardware == "NVIDIA B300"
    assert profile.kv_capacity_tokens == int((0.9 * 288e9 - 2 * MODEL.num_parameters() - 2e9) / 131_072) // 16 * 16


def run_command(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import sys; {before}\nfrom fastserve.cli import main\nsys.argv[1:] = {list(arguments)!r}\nmain()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_command_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ("profile", "--kernels", str(folder), "--model", "llama-3.1-8b", "--out", str(out))
    done = run_command(*arguments, before="sys.modules['torch'] = None")
    assert done.returncode == 0, done.stderr
    assert f"wrote {out}" in done.stdout
    assert load_profile(str(out)).model == "llama-3.1-8b"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "cuda"], "--device has no meaning with --kernels"),
        (["--max-batch-size", "8"], "--max-batch-size has no meaning with --kernels"),
        (["--quick"], "--quick has no meaning with --kernels"),
        (["--pipeline-parallel-size", "2"], "tables in this layout are of one stage"),
        (["--model", "nowhere/config.json"], "model 'nowhere/config.json' does not exist"),
    ],
)
def test_the_command_refuses_what_it_would_ignore(more: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    arguments = ["--kernels", str(folder), "--model", "llama-3.1-8b", "--out", str(tmp_path / "out.json")]
    done = run_command("profile", *arguments, *more)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_memory_is_of_kernel_tables_only(tmp_path: Path) -> None:
    done = run_command("profile", "--model", "opt-tiny", "--out", str(tmp_path / "out.json"), "--gpu-memory-gb", "24")
    assert done.returncode == 2
    assert "--gpu-memory-gb is for --kernels" in done.stderr

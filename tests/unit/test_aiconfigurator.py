"""Kernel tables by operator: stages put together by hand, substitutions and extrapolations said, faults refused."""

import csv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fastserve.core.config import ModelConfig
from fastserve.core.errors import ConfigError
from fastserve.core.parallel import ParallelConfig
from fastserve.core.presets import preset
from fastserve.latency import KernelLatency, KernelTables, Profile
from fastserve.profiling.kernels.importing import import_profile

SYSTEM: dict[str, Any] = {
    "gpu": {
        "mem_bw": 2e12,
        "mem_bw_empirical_scaling_factor": 0.8,
        "mem_empirical_constant_latency": 3e-6,
        "mem_capacity": 80e9,
    },
    "node": {
        "num_gpus_per_node": 8,
        "inter_node_bw": 25e9,
        "intra_node_bw": 300e9,
        "pcie_bw": 32e9,
        "p2p_latency": 1e-5,
    },
    "misc": {"nccl_version": "2.27.3"},
}
SIZES = (512, 1024, 2048, 4096, 8192, 16_384, 65_536)
TOKENS = (1, 64, 1024, 8192)
HEADS = ((8, 8), (4, 4), (2, 2), (8, 2), (16, 2), (32, 8), (40, 40))


def product_ms(m: int, n: int, k: int) -> float:
    """Of a machine whose products take longer by n, by k and by both."""
    return 1e-3 * (1 + n / 1000 + k / 2000 + 2e-8 * n * k * (1 + m / 64))


def decode_ms(sequences: int, kv_heads: int, tokens: int) -> float:
    return 0.01 + 1e-6 * sequences * kv_heads * tokens


def prompt_ms(sequences: int, heads: int, tokens: int) -> float:
    return 0.01 + 1e-8 * sequences * heads * tokens**2


def sum_ms(numbers: int) -> float:
    return 0.005 + 1e-8 * numbers


def write(path: Path, header: str, rows: list[tuple[Any, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header.split(","), *rows])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`systems/data/gpu/vllm/0.14.0`."""
    systems = tmp_path / "systems"
    tables = systems / "data/gpu/vllm/0.14.0"
    common = ("VLLM", "0.14.0", "A GPU", "op", "kernel")
    write(
        tables / "gemm_perf.txt",
        "framework,version,device,op_name,kernel_source,gemm_dtype,m,n,k,latency",
        [
            (*common, "float16", m, n, k, product_ms(m, n, k))
            for m in TOKENS
            for n in SIZES
            for k in SIZES
            if (n, k) != (65_536, 65_536)
        ]
        + [(*common, "fp8", 1, 512, 512, 1e-9)],
    )
    attention = (
        "framework,version,device,op_name,kernel_source,batch_size,isl,num_heads,num_key_value_heads,head_dim,"
        "beam_width,attn_dtype,kv_cache_dtype,step,latency"
    )
    write(
        tables / "context_attention_perf.txt",
        attention,
        [
            (
                *common,
                batch,
                tokens,
                heads,
                kv,
                128,
                1,
                "float16",
                "float16",
                0,
                prompt_ms(batch, heads, tokens) * factor,
            )
            for heads, kv in HEADS
            for batch in (1, 2, 4, 8)
            for tokens in (16, 512, 4096)
            for factor in ((0.9, 1.1) if heads == kv else (1,))  # Twice, as in the published tables.
            if batch * tokens <= 8192
        ],
    )
    write(
        tables / "generation_attention_perf.txt",
        attention,
        [
            (*common, batch, 1, heads, kv, 128, 1, "float16", "float16", tokens - 1, decode_ms(batch, kv, tokens))
            for heads, kv in HEADS
            if kv <= 8
            for batch in (1, 2, 4, 8, 16, 64)
            for tokens in (2, 512, 4096)
            if batch * tokens <= 65_536
        ],
    )
    write(
        tables / "custom_allreduce_perf.txt",
        "framework,version,device,op_name,kernel_source,allreduce_dtype,num_gpus,message_size,latency,backend",
        [
            (*common, "float16", 4, 2**power, sum_ms(2**power) * factor, f"vllm_{backend}")
            for power in (7, 14, 20)
            for backend, factor in (("graph", 1), ("eager", 9))
        ],
    )
    write(
        systems / "data/gpu/nccl/2.27.3/nccl_perf.txt",
        "framework,version,device,op_name,kernel_source,nccl_dtype,num_gpus,message_size,latency",
        [
            ("TRTLLM", "2.27.3", "A GPU", operation, "NCCL", dtype, gpus, 2**power, 2 * sum_ms(2**power))
            for operation in ("all_reduce", "all_gather")
            for gpus in (2, 4)
            for dtype in ("half", "int8")
            for power in (8, 18, 28)
        ],
    )
    (systems / "gpu.yaml").write_text(yaml.safe_dump(SYSTEM))
    return tables


def profile_of(folder: Path, model: str | ModelConfig, shards: int = 1, stages: int = 1) -> Profile:
    config = preset(model) if isinstance(model, str) else model
    return import_profile(f"aiconfigurator:{folder}", config, ParallelConfig(shards, stages), "mine")


def tables_of(profile: Profile) -> tuple[KernelTables, ...]:
    stages = (profile.stage, *profile.later_stages)
    assert all(isinstance(stage, KernelLatency) for stage in stages)
    return tuple(stage.tables for stage in stages if isinstance(stage, KernelLatency))


def element_wise_s(num_bytes: float) -> float:
    return 3e-6 + num_bytes / 1.6e12


def llama_layer_s(tokens: int, heads: int, kv_heads: int, inner: int, hidden: int = 4096) -> float:
    """Of one shard by hand, without attention and all-reduces."""
    products = (
        product_ms(tokens, 128 * (heads + 2 * kv_heads), hidden),
        product_ms(tokens, hidden, 128 * heads),
        product_ms(tokens, 2 * inner, hidden),
        product_ms(tokens, hidden, inner),
    )
    traffic = (4 * hidden, 4 * hidden, 2 * 128 * (heads + kv_heads), 3 * inner)
    return 1e-3 * sum(products) + sum(element_wise_s(2 * tokens * numbers) for numbers in traffic)


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_stage_is_the_sum_of_its_kernels(tokens: int, folder: Path) -> None:
    (tables,) = tables_of(profile_of(folder, "llama-3.1-8b"))
    once = element_wise_s(2 * tokens * 2 * 4096) + element_wise_s(2 * tokens * 4 * 4096)
    expected = 32 * llama_layer_s(tokens, 32, 8, 14_336) + once
    assert dict(zip(tables.dense.at, tables.dense.seconds, strict=True))[tokens] == pytest.approx(expected, rel=1e-5)


def test_attention_is_the_measured_one(folder: Path) -> None:
    (tables,) = tables_of(profile_of(folder, "llama-3.1-8b"))
    assert tables.prompts_by_length
    assert tables.mixed == ()
    assert [sequences for sequences, _ in tables.decode] == [1, 2, 4, 8, 16, 64]
    for sequences, curve in tables.decode:
        for tokens, seconds in zip(curve.at, curve.seconds, strict=True):
            assert seconds == pytest.approx(32e-3 * decode_ms(sequences, 8, tokens), rel=1e-5)
    assert tables.decode[0][1].at == (2, 512, 4096)  # The step counts from 0: with the new token.
    assert tables.decode[-1][1].at == (2, 512)
    for sequences, curve in tables.prompts:
        for tokens, seconds in zip(curve.at, curve.seconds, strict=True):
            assert seconds == pytest.approx(32e-3 * prompt_ms(sequences, 32, tokens), rel=1e-5)


def test_shards_sum_by_the_numbers_of_a_message(folder: Path) -> None:
    (tables,) = tables_of(profile_of(folder, "llama-3.1-8b", shards=4))
    dense = dict(zip(tables.dense.at, tables.dense.seconds, strict=True))

    def beside(tokens: int) -> float:
        once = element_wise_s(2 * tokens * 2 * 4096) + element_wise_s(2 * tokens * 4 * 4096)
        return 32 * llama_layer_s(tokens, 8, 2, 3584) + once

    # 65 messages: two a layer, one for the embedding. With graphs, not eager; beyond 2^20 numbers NCCL's.
    for tokens in (1, 64):
        assert dense[tokens] == pytest.approx(beside(tokens) + 65e-3 * sum_ms(4096 * tokens), rel=1e-5)
    sum_of_8192 = np.interp(2**25, (2**20, 2**28), (sum_ms(2**20), 2 * sum_ms(2**28)))
    assert dense[8192] == pytest.approx(beside(8192) + 65e-3 * sum_of_8192, rel=1e-5)
    # 2^14 numbers are 4 tokens, 2^20 are 256: points of the sum, where no product was measured.
    assert tables.dense.at == (1, 4, 64, 256, 1024, 8192)
    between = beside(1) + (beside(64) - beside(1)) * 3 / 63
    assert dense[4] == pytest.approx(between + 65e-3 * sum_ms(2**14), rel=1e-5)


def test_the_head_works_by_sequences(folder: Path) -> None:
    one, four = (tables_of(profile_of(folder, "llama-3.1-8b", shards=shards))[0] for shards in (1, 4))
    assert one.per_sequence is not None
    assert four.per_sequence is not None
    # 128,256 columns are 1.957 x the largest measured.
    head = product_ms(64, 65_536, 4096) * 128_256 / 65_536
    expected = 1e-3 * head + element_wise_s(64 * 128_256 * 10)
    assert dict(zip(one.per_sequence.at, one.per_sequence.seconds, strict=True))[64] == pytest.approx(
        expected, rel=1e-5
    )
    shard = 1e-3 * product_ms(64, 32_064, 4096) + element_wise_s(64 * 128_256 * 10) + 2e-3 * sum_ms(64 * 128_256)
    assert dict(zip(four.per_sequence.at, four.per_sequence.seconds, strict=True))[64] == pytest.approx(shard, rel=1e-4)


def test_what_lies_beyond_the_measured_is_said(folder: Path) -> None:
    profile = profile_of(folder, "llama-3.1-8b")
    assert profile.provenance["warnings"] == [
        "lm_head has n 128256, 1.96 x the largest measured (65536): its time is that of 65536, in proportion"
    ]
    assert "warnings" not in profile_of(folder, "llama-3.1-8b", shards=4).provenance
    assert "estimated, not measured" in profile.provenance["element_wise"]


def test_many_heads_are_priced_as_sequences_of_few(folder: Path) -> None:
    profile = profile_of(folder, "opt-13b")
    (tables,) = tables_of(profile)
    decode = dict(tables.decode)
    # 40 heads are five sequences of 8. Rows are the whole numbers around 1/5, 2/5, 4/5, 8/5, 16/5 and 64/5.
    assert sorted(decode) == [1, 2, 3, 4, 12]
    for sequences, curve in decode.items():
        for tokens in (2, 512):
            seconds = dict(zip(curve.at, curve.seconds, strict=True))[tokens]
            assert seconds == pytest.approx(40e-3 * decode_ms(5 * sequences, 8, tokens), rel=1e-5)
    assert profile.provenance["warnings"] == [
        "attention of decode: 40 heads and 40 KV heads were not measured; a sequence is priced as 5 of 8 and 8 heads, "
        "which are the same work"
    ]
    # Prompts were measured with 40 heads, twice: the mean counts.
    seconds = dict(zip(tables.prompts[0][1].at, tables.prompts[0][1].seconds, strict=True))[512]
    assert seconds == pytest.approx(40e-3 * prompt_ms(1, 40, 512), rel=1e-5)


def test_the_largest_measured_part_of_the_heads_is_taken(folder: Path) -> None:
    warnings = profile_of(folder, "opt-66b", shards=4).provenance["warnings"]
    assert [warning.partition("; ")[2] for warning in warnings] == [
        "a sequence is priced as 9 of 2 and 2 heads, which are the same work"
    ] * 2


def test_a_pipeline_has_the_head_in_its_last_stage(folder: Path) -> None:
    profile = profile_of(folder, "opt-13b", stages=2)
    first, second = tables_of(profile)
    assert first.per_sequence is None
    assert second.per_sequence is not None
    # Of OPT's embedding three operations, of the last norm one; twenty layers each.
    hidden = 2 * 5120
    embedding = 2 * element_wise_s(2 * hidden) + element_wise_s(3 * hidden)
    assert first.dense.seconds[0] - second.dense.seconds[0] == pytest.approx(
        embedding - element_wise_s(2 * hidden), abs=1e-7
    )
    assert profile.stage_link is not None
    assert (profile.stage_link.bandwidth_bytes_per_s, profile.stage_link.bytes_per_token) == (300e9, 10_240)
    # The fullest stage: 20 layers, half of 819,200 bytes a token, and both have a table of the vocabulary.
    layers, tables = 20 * 12 * 5120**2, 50_272 * 5120 + 2048 * 5120
    free = 0.9 * 80e9 - 2 * (layers + tables) - 2e9
    assert profile.kv_capacity_tokens == int(free / 409_600) // 16 * 16


def test_qwen3_norms_its_queries_and_keys(folder: Path) -> None:
    qwen = replace(preset("llama-3.1-8b"), name="small-qwen", architecture="qwen3")
    (with_norms,), (without,) = (tables_of(profile_of(folder, model)) for model in (qwen, "llama-3.1-8b"))
    norms = element_wise_s(2 * 2 * 32 * 128) + element_wise_s(2 * 2 * 8 * 128)
    assert with_norms.dense.seconds[0] - without.dense.seconds[0] == pytest.approx(32 * norms, rel=1e-2)


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def system(section: str, key: str, value: Any) -> Callable[[Path], None]:
    changed = SYSTEM | {section: SYSTEM[section] | {key: value}}
    return lambda folder: (folder.parents[3] / "gpu.yaml").write_text(yaml.safe_dump(changed)) and None


def faults() -> Iterator[tuple[Callable[[Path], None], str]]:
    yield lambda folder: (folder / "gemm_perf.txt").unlink(), r"gemm_perf\.txt does not exist\. Give a folder such as"
    yield lambda folder: (folder.parents[3] / "gpu.yaml").unlink(), r"gpu\.yaml does not exist, so GPU 'gpu' is unknown"
    yield system("gpu", "mem_bw", "fast"), r"gpu\.yaml: gpu\.mem_bw is 'fast'; it must be a number above 0"
    yield system("misc", "nccl_version", "9"), r"nccl/9/nccl_perf\.txt does not exist"
    yield lambda folder: (folder.parents[3] / "gpu.yaml").write_text("gpu: 1") and None, r"has no gpu\.mem_capacity"
    gemm = "gemm_perf.txt"
    yield lambda folder: replaced(folder / gemm, "latency", "time"), r"gemm_perf\.txt, row 1: no column 'latency'"
    yield lambda folder: replaced(folder / gemm, "float16,64,512,512", "float16,1,512,512"), r"m 1, n 512, k 512 are in"
    yield (
        lambda folder: replaced(folder / gemm, "float16,1,512", "float16,0,512"),
        r"row 2: m is '0'; it must be a whole",
    )
    yield (
        lambda folder: (folder / gemm).write_text((folder / gemm).read_text().replace("float16", "int4")) and None,
        "no rows with gemm_dtype float16",
    )
    decode = "generation_attention_perf.txt"
    yield lambda folder: replaced(folder / decode, "1,0.01", "1,-0.01"), r"generation_attention.*row 2: latency is '-0"
    yield lambda folder: replaced(folder / decode, ",8,8,128", ",8,3,128"), r"row 2: 8 heads do not divide into 3"
    sums = "custom_allreduce_perf.txt"
    yield lambda folder: replaced(folder / sums, "4,16384,", "4,128,"), r"row 4: message_size 128 is in the table twice"


@pytest.mark.parametrize(("spoil", "message"), list(faults()), ids=[message[:40] for _, message in faults()])
def test_wrong_tables_are_refused(spoil: Callable[[Path], None], message: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(ConfigError, match=message):
        profile_of(folder, "llama-3.1-8b", shards=4)


@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_another_unit_is_refused(scale: float, folder: Path) -> None:
    for path in folder.iterdir():
        header, *rows = csv.reader(path.read_text().splitlines())
        at = header.index("latency")
        write(path, ",".join(header), [(*row[:at], scale * float(row[at]), *row[at + 1 :]) for row in rows])
    with pytest.raises(ConfigError, match=r"one token takes .* s in one layer.*times must be in milliseconds"):
        profile_of(folder, "llama-3.1-8b")


@pytest.mark.parametrize(
    ("model", "shards", "message"),
    [
        (preset("opt-125m"), 1, "head_dim 64; .* holds attention of 128 only"),
        (preset("llama-3.1-8b"), 8, r"nccl_perf\.txt: no all_reduce of 8 GPUs; use a tensor_parallel_size among 2, 4"),
        (
            replace(preset("llama-3.1-8b"), intermediate_size=256),
            1,
            "down_proj has k 256, the smallest measured is 512",
        ),
        (replace(preset("llama-3.1-8b"), num_heads=24), 1, r"no rows for 24 heads and 8 KV heads, nor for a part"),
        (
            replace(preset("llama-2-7b"), intermediate_size=40_000, hidden_size=40_000),
            1,
            "no rows for n 65536, k 65536",
        ),
        (preset("opt-66b"), 1, "does not fit A GPU: .*131.4 GB of weights, and 0.9 of 80.0 GB less 2 GB are 70.0 GB"),
    ],
)
def test_what_the_tables_cannot_give_is_refused(model: ModelConfig, shards: int, message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        profile_of(folder, model, shards)


@pytest.mark.parametrize(("path", "message"), [("/nowhere", "is no folder"), ("/", "does not lie in aiconfigurator's")])
def test_another_folder_is_refused(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        profile_of(Path(path), "llama-3.1-8b")

"""Paged attention against dense float64 attention, in a cache full of NaN wherever nothing was stored."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import LAYER, LAYERS, TOLERANCE, Batch, make_batch, relative_error
from targets import Target, make_target, on_gpu

from fastserve.core.presets import PRESETS

HEADS = sorted({(config.num_heads, config.num_kv_heads, config.head_dim) for config in PRESETS.values()})
# The interpreter gets few of them, in groups as large and of the same dimensions.
FEW_HEADS = sorted({(heads // kv_heads, 1, head_dim) for heads, kv_heads, head_dim in HEADS} | {(4, 2, 16)})

DECODES = [1, 16, 61, 200]
PREFILLS = [(0, 2), (0, 53), (33, 45), (90, 150)]
LONG_DECODES = [*DECODES, 15, 17, 500, 1111, 2047]
LONG_PREFILLS = [*PREFILLS, (1, 7), (0, 16), (31, 1), (0, 700), (1500, 333), (16, 128)]


def check(target: Target, batch: Batch, dtype: torch.dtype) -> None:
    out = target.kernels.paged_attention(batch.query, batch.cache, LAYER, batch.metadata, batch.scale)
    assert out.dtype == dtype
    assert out.is_contiguous()
    errors = batch.errors(out)
    assert all(error < TOLERANCE[dtype] for error in errors), errors


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", FEW_HEADS, ids=str)
def test_equals_dense_attention(target: Target, dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    check(target, make_batch(target.device, DECODES, PREFILLS, heads=heads, dtype=dtype), dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_equals_dense_attention_with_all_heads(
    gpu_target: Target, dtype: torch.dtype, heads: tuple[int, int, int]
) -> None:
    check(gpu_target, make_batch(gpu_target.device, LONG_DECODES, LONG_PREFILLS, heads=heads, dtype=dtype), dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("decodes", [[], DECODES], ids=["no decodes", "decodes"])
@pytest.mark.parametrize("block_size", [1, 5, 8, 32])
def test_any_block_size(target: Target, block_size: int, decodes: list[int]) -> None:
    options = {"heads": (4, 2, 16), "dtype": torch.float32, "block_size": block_size}
    check(target, make_batch(target.device, decodes, [(1, 7), (33, 45)], **options), torch.float32)  # type: ignore[arg-type]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("order", [(1, 2, 0, 3, 4, 5), (0, 1, 2, 4, 3, 5)], ids=["layers first", "heads before tokens"])
def test_any_layout(triton_target: Target, order: tuple[int, ...]) -> None:
    batch = make_batch(triton_target.device, [40, 3], [(5, 30)], heads=(4, 2, 16), dtype=torch.float32, order=order)
    check(triton_target, batch, torch.float32)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("num_splits", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "use_dot"),
    [((1, 1, 80), False), ((1, 1, 80), True), ((4, 1, 16), True)],
    ids=["elementwise", "dot", "group"],
)
def test_splits_of_unequal_shares(
    triton_target: Target, heads: tuple[int, int, int], dtype: torch.dtype, num_splits: int, use_dot: bool
) -> None:
    """A context of several thousand tokens among short ones; 20 splits are more than are combined at once."""
    from fastserve.runtime.kernels.triton_kernels import decode_attention

    batch = make_batch(triton_target.device, [3, 2500, 129, 130, 700], [], heads=heads, dtype=dtype)
    out = torch.full_like(batch.query, math.nan, memory_format=torch.contiguous_format)
    tiling = decode_attention.DecodeTiling(32, 4, 3, use_dot)
    decode_attention.attend_decodes(
        batch.query, batch.cache, LAYER, batch.metadata, batch.scale, out, tiling=tiling, num_splits=num_splits
    )
    errors = batch.errors(out)
    assert all(error < TOLERANCE[dtype] for error in errors), errors


@settings(max_examples=200)
@given(
    num_decodes=st.integers(1, 600),
    kv_heads=st.sampled_from([1, 4, 8, 32, 40, 96]),
    max_context=st.integers(1, 200_000),
    multiprocessors=st.sampled_from([4, 108, 132]),
)
def test_the_gpu_is_full_where_contexts_can_be_long_enough(
    num_decodes: int, kv_heads: int, max_context: int, multiprocessors: int
) -> None:
    from fastserve.runtime.kernels.triton_kernels import decode_attention

    splits = decode_attention.split_count(num_decodes, kv_heads, max_context, multiprocessors)
    possible = min(-(-max_context // decode_attention.MIN_CHUNK), decode_attention.MAX_SPLITS)
    assert 1 <= splits <= possible
    assert splits == possible or splits * num_decodes * kv_heads >= 2 * multiprocessors
    assert splits == 1 or (splits - 1) * num_decodes * kv_heads < 4 * multiprocessors


def test_addresses_beyond_int32(target: Target) -> None:
    """A cache of more than 2^31 elements, of which a CPU commits only the few pages that are used."""
    heads, kv_heads, head_dim, block_size, layers = 2, 2, 64, 16, 2048
    num_blocks = 2**31 // (layers * 2 * block_size * kv_heads * head_dim) + 3
    cache = torch.empty(
        (num_blocks, layers, 2, block_size, kv_heads, head_dim), dtype=torch.float16, device=target.device
    )
    layer, table = layers - 1, [num_blocks - 1, 0, num_blocks - 2]
    cache[table, layer] = math.nan
    small = make_batch(target.device, [35], [], heads=(heads, kv_heads, head_dim), dtype=torch.float16)
    slots = torch.tensor([table[i // 16] * 16 + i % 16 for i in range(35)], device=target.device)
    target.kernels.store_kv(cache, layer, small.keys[0], small.values[0], slots)
    small.metadata.block_tables[:, :3] = torch.tensor(table, device=target.device)
    out = target.kernels.paged_attention(small.query, cache, layer, small.metadata, small.scale)
    assert max(small.errors(out)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("dtype", [on_gpu(torch.float16), on_gpu(torch.bfloat16)], ids=str)
def test_a_graph_replays_with_other_contexts(dtype: torch.dtype) -> None:
    target = make_target("triton-cuda")
    kernels, device = target.kernels, target.device
    heads = (8, 8, 128)
    first, second = (make_batch(device, lens, [], heads=heads, dtype=dtype) for lens in ([1, 300, 40], [1500, 2, 33]))
    width = max(batch.metadata.block_tables.shape[1] for batch in (first, second))
    tables = torch.zeros(3, width, dtype=torch.int64, device=device)
    contexts = torch.ones(3, dtype=torch.int64, device=device)
    cache = torch.full((200, LAYERS, 2, 16, heads[1], heads[2]), math.nan, dtype=dtype, device=device)
    query = torch.empty(3, heads[0], heads[2], dtype=dtype, device=device)
    metadata = type(first.metadata)(3, 1, first.metadata.query_starts, contexts, tables, [], [], [])

    def load(batch: Batch) -> None:
        cache.fill_(math.nan)
        cache[: len(batch.cache)] = batch.cache
        tables[:, : batch.metadata.block_tables.shape[1]] = batch.metadata.block_tables
        contexts.copy_(batch.metadata.context_lens)
        query.copy_(batch.query)

    load(first)
    kernels.paged_attention(query, cache, LAYER, metadata, first.scale)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.paged_attention(query, cache, LAYER, metadata, first.scale)
    for batch in (second, first):
        load(batch)
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert max(batch.errors(out)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", [1, 2, 12, 40])
def test_store_writes_its_slots_and_nothing_else(target: Target, heads: int, dtype: torch.dtype) -> None:
    head_dim = 80
    cache = torch.full((4, LAYERS, 2, 8, heads, head_dim), math.nan, dtype=dtype, device=target.device)
    fused = torch.randn(3, 3 * heads, head_dim, device=target.device).to(dtype)  # query, key, value of one projection
    key, value = fused[:, heads : 2 * heads], fused[:, 2 * heads :]
    target.kernels.store_kv(cache, 2, key, value, torch.tensor([8 * 3 + 7, 0, 8 * 2 + 1], device=target.device))
    assert torch.equal(cache[[3, 0, 2], 2, 0, [7, 0, 1]], key)
    assert torch.equal(cache[[3, 0, 2], 2, 1, [7, 0, 1]], value)
    assert int((~cache.isnan()).sum()) == 3 * 2 * heads * head_dim


def test_the_measure_of_errors_sees_nan() -> None:
    assert not relative_error(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 1.0]).double()) < 1e9

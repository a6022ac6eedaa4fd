"""The paged attention reference against dense float64 attention, in a cache full of NaN wherever nothing was stored."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastserve.kernels import paged_attention, store_kv
from fastserve.models import ForwardBatch, SequenceInput

LAYERS, HEAD_DIM = 3, 32
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

# (context before, query tokens) of each request; block size 16 and its neighbours are the edges.
MIXES = {
    "decodes": [(0, 1), (14, 1), (15, 1), (16, 1), (60, 1)],
    "prefills": [(0, 1), (0, 2), (0, 15), (0, 16), (0, 17), (0, 53)],
    "chunks": [(1, 7), (16, 16), (31, 2), (33, 45)],
    "mixed, decodes last": [(0, 37), (19, 13), (47, 1), (5, 1)],
}


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Float64 attention of the last `len(query)` positions of one request; `[tokens, heads, head_dim]`."""
    query, key, value = (t.double().transpose(0, 1) for t in (query, key, value))
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scores = query @ key.transpose(1, 2) * scale
    queries, context = scores.shape[1:]
    future = torch.arange(context) > torch.arange(context - queries, context).unsqueeze(1)
    return (scores.masked_fill(future, -math.inf).softmax(-1) @ value).transpose(0, 1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("mix", MIXES.values(), ids=list(MIXES))
@pytest.mark.parametrize("block_size", [16, 5])
def test_equals_dense_attention(
    dtype: torch.dtype, heads: int, kv_heads: int, mix: list[tuple[int, int]], block_size: int
) -> None:
    torch.manual_seed(0)
    layer, scale = 1, HEAD_DIM**-0.5
    blocks_needed = [-(-(before + new) // block_size) for before, new in mix]
    free = torch.randperm(sum(blocks_needed) + 4).tolist()
    cache = torch.full((len(free), LAYERS, 2, block_size, kv_heads, HEAD_DIM), math.nan, dtype=dtype)
    tables = [[free.pop() for _ in range(count + (index == 0))] for index, count in enumerate(blocks_needed)]
    keys = [torch.randn(before + new, kv_heads, HEAD_DIM).to(dtype) for before, new in mix]
    values = [torch.randn(before + new, kv_heads, HEAD_DIM).to(dtype) for before, new in mix]
    queries = [torch.randn(new, heads, HEAD_DIM).to(dtype) for _, new in mix]

    for table, key, value in zip(tables, keys, values, strict=True):
        slots = torch.tensor([table[i // block_size] * block_size + i % block_size for i in range(len(key))])
        store_kv(cache, layer, key, value, slots)
    batch = ForwardBatch.build(
        [SequenceInput([7] * new, before, table) for (before, new), table in zip(mix, tables, strict=True)],
        block_size,
        "cpu",
    )
    output = paged_attention(torch.cat([queries[i] for i in batch.order]), cache, layer, batch.attention, scale)

    wanted = torch.cat([dense(queries[i], keys[i], values[i], scale) for i in batch.order])
    assert output.dtype == dtype
    assert ((output.double() - wanted).norm() / wanted.norm()).item() < TOLERANCE[dtype]


def test_store_writes_its_slots_and_nothing_else() -> None:
    cache = torch.full((4, LAYERS, 2, 8, 2, HEAD_DIM), math.nan)
    fused = torch.randn(3, 6, HEAD_DIM)  # query, key and value of one projection: strided views
    slots = torch.tensor([8 * 3 + 7, 0, 8 * 2 + 1])
    store_kv(cache, 2, fused[:, 2:4], fused[:, 4:], slots)
    assert torch.equal(cache[[3, 0, 2], 2, 0, [7, 0, 1]], fused[:, 2:4])
    assert torch.equal(cache[[3, 0, 2], 2, 1, [7, 0, 1]], fused[:, 4:])
    assert int((~cache.isnan()).sum()) == 3 * 2 * 2 * HEAD_DIM


def test_batch_puts_decodes_first_and_gives_results_back_in_order() -> None:
    batch = ForwardBatch.build(
        [SequenceInput([1, 2], 4, [9, 5]), SequenceInput([3], 6, [2, 1]), SequenceInput([4, 5, 6], 0, [7])], 4, "cpu"
    )
    assert batch.order == [1, 0, 2]
    assert batch.attention.num_decodes == 1
    assert batch.token_ids.tolist() == [3, 1, 2, 4, 5, 6]
    assert batch.positions.tolist() == [6, 4, 5, 0, 1, 2]
    assert batch.slot_mapping.tolist() == [6, 20, 21, 28, 29, 30]
    assert batch.attention.query_lens == [1, 2, 3]
    assert batch.attention.context_lens == batch.attention.context_lens_device.tolist() == [7, 6, 3]
    assert batch.attention.block_tables.tolist() == [[2, 1], [9, 5], [7, 0]]
    assert [blocks.tolist() for blocks in batch.attention.blocks] == [[2, 1], [9, 5], [7]]
    last = batch.last_tokens()
    assert last is not None
    assert last.tolist() == [0, 2, 5]
    assert batch.in_callers_order([10, 20, 30]) == [20, 10, 30]


@pytest.mark.parametrize("sequence", [SequenceInput([], 0, [1]), SequenceInput([1], 4, [3])], ids=["empty", "no block"])
def test_batch_refuses_what_it_cannot_lay_out(sequence: SequenceInput) -> None:
    with pytest.raises(ValueError, match="needs at least one token and"):
        ForwardBatch.build([sequence], 4, "cpu")

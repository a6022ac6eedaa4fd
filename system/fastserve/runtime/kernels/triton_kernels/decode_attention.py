"""Attention of single queries on the paged cache, each context split over several programs (flash-decoding).

The launch fixes how many programs share a context, since a CUDA graph replays it with other contexts. The device
computes each program's part. The time goes into reading keys and values once, so the number of bytes in flight matters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache as memoize

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastserve.runtime.kernels.metadata import AttentionMetadata
from fastserve.runtime.kernels.triton_kernels.primitives import chip, dot, power_of_two, token_offsets

MIN_CHUNK = 128
"""Fewest tokens of a context for one program."""
PROGRAMS_PER_MULTIPROCESSOR = 4
"""Programs that run at the same time; more splits only add partial results."""
MAX_SPLITS = 64

_LOWEST = tl.constexpr(-3.0e38)
_SPLITS_AT_ONCE = tl.constexpr(16)


@dataclass(frozen=True, slots=True)
class DecodeTiling:
    """How one program reads its part of a context."""

    block_n: int
    """Tokens of a step."""
    num_warps: int
    num_stages: int
    """Steps loaded ahead through shared memory; 1: load to registers."""
    use_dot: bool
    """Whether to use tensor cores, with a KV head's queries padded to 16; otherwise multiply elementwise."""


@memoize
def decode_tiling(dtype: torch.dtype, head_dim: int, group: int) -> DecodeTiling:
    """The tiling for heads of `head_dim` with `group` query heads to a KV head.

    A step reads 16 KiB of keys and values, and two more steps are in flight. Registers suffice for five programs on a
    multiprocessor. A single query also uses tensor cores: 15 rows of padding are free there, and elementwise products
    take twice the instructions a byte.
    """
    if dtype == torch.float32:
        return DecodeTiling(16, 4, 3, group > 1)
    return DecodeTiling(max(32, min(128, 4096 // power_of_two(head_dim))), 4, 5, True)


def split_count(num_decodes: int, num_kv_heads: int, max_context: int, multiprocessors: int) -> int:
    """Programs that share one context: enough to fill the GPU, if contexts can be long enough."""
    wanted = round(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors / (num_decodes * num_kv_heads))
    return max(1, min(wanted, -(-max_context // MIN_CHUNK), MAX_SPLITS))


@triton.jit
def _chunk(context, num_splits, CHUNK: tl.constexpr):
    """Tokens of a context for each program but the last."""
    share = (context + num_splits - 1) // num_splits
    return (share + CHUNK - 1) // CHUNK * CHUNK


@triton.jit
def _attend_elementwise(
    queries,
    keys,
    stride_kv,
    table,
    low,
    high,
    scale_log2,
    stride_block,
    stride_token,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One query `[BLOCK_D]`. Each row of a tile keeps its own softmax, and they are merged once at the end, so that no
    warp waits for another in the loop."""
    rows = tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    query = tl.load(queries + cols, mask=cols < HEAD_DIM, other=0.0).to(tl.float32) * scale_log2
    top = tl.full([BLOCK_N], _LOWEST, tl.float32)
    total = tl.full([BLOCK_N], 0.0, tl.float32)
    acc = tl.full([BLOCK_N, BLOCK_D], 0.0, tl.float32)
    for start in tl.range(low, high, BLOCK_N, num_stages=NUM_STAGES):
        tokens = start + rows
        valid = tokens < high
        offsets = token_offsets(table, tokens, valid, stride_block, stride_token, BLOCK_SIZE)[:, None] + cols[None, :]
        mask = valid[:, None]
        if HEAD_DIM != BLOCK_D:
            mask = mask & (cols < HEAD_DIM)[None, :]
        key = tl.load(keys + offsets, mask=mask, other=0.0)
        value = tl.load(keys + stride_kv + offsets, mask=mask, other=0.0)
        score = tl.where(valid, tl.sum(query[None, :] * key.to(tl.float32), 1), float("-inf"))
        new_top = tl.maximum(top, score)
        shrink = tl.exp2(top - new_top)
        weight = tl.exp2(score - new_top)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * value.to(tl.float32)
        top = new_top
    highest = tl.max(top, 0)
    weight = tl.exp2(top - highest)
    total = tl.sum(total * weight, 0)
    result = tl.sum(acc * weight[:, None], 0) / total
    return result[None, :], tl.full([1], 0.0, tl.float32) + highest + tl.log2(total)


@triton.jit
def _attend_dot(
    queries,
    stride_query_head,
    keys,
    stride_kv,
    table,
    low,
    high,
    scale_log2,
    stride_block,
    stride_token,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """The queries of a KV head, padded to `[BLOCK_G, BLOCK_D]`."""
    members = tl.arange(0, BLOCK_G)[:, None]
    rows = tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    query = tl.load(
        queries + members * stride_query_head + cols[None, :],
        mask=(members < GROUP) & (cols < HEAD_DIM)[None, :],
        other=0.0,
    )
    top = tl.full([BLOCK_G], _LOWEST, tl.float32)
    total = tl.full([BLOCK_G], 0.0, tl.float32)
    acc = tl.full([BLOCK_G, BLOCK_D], 0.0, tl.float32)
    for start in tl.range(low, high, BLOCK_N, num_stages=NUM_STAGES):
        tokens = start + rows
        valid = tokens < high
        offsets = token_offsets(table, tokens, valid, stride_block, stride_token, BLOCK_SIZE)[:, None] + cols[None, :]
        mask = valid[:, None]
        if HEAD_DIM != BLOCK_D:
            mask = mask & (cols < HEAD_DIM)[None, :]
        key = tl.load(keys + offsets, mask=mask, other=0.0)
        value = tl.load(keys + stride_kv + offsets, mask=mask, other=0.0)
        score = tl.where(valid[None, :], dot(query, tl.trans(key)) * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        shrink = tl.exp2(top - new_top)
        weight = tl.exp2(score - new_top[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None] + dot(weight.to(value.dtype), value)
        top = new_top
    return acc / total[:, None], top + tl.log2(total)


@triton.jit(
    do_not_specialize=["layer", "num_splits", "stride_table"],
    do_not_specialize_on_alignment=["context_lens", "block_tables"],
)
def _decode_kernel(
    query,
    cache,
    out,
    partial,
    partial_lse,
    context_lens,
    block_tables,
    layer,
    num_splits,
    scale_log2,
    stride_query_token,
    stride_query_head,
    stride_block,
    stride_layer,
    stride_kv,
    stride_token,
    stride_head,
    stride_table,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    kv_head = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    context = tl.load(context_lens + request).to(tl.int32)
    low = 0
    high = context
    if SPLIT:
        chunk = _chunk(context, num_splits, CHUNK)
        low = tl.program_id(2) * chunk
        high = tl.minimum(low + chunk, context)
        if low >= context:
            return
    first_head = kv_head * GROUP
    queries = query + request * stride_query_token + first_head * stride_query_head
    keys = cache + layer.to(tl.int64) * stride_layer + kv_head.to(tl.int64) * stride_head
    table = block_tables + request * stride_table
    if BLOCK_G == 1:
        result, lse = _attend_elementwise(
            queries, keys, stride_kv, table, low, high, scale_log2, stride_block, stride_token,
            HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, NUM_STAGES,
        )  # fmt: skip
    else:
        result, lse = _attend_dot(
            queries, stride_query_head, keys, stride_kv, table, low, high, scale_log2, stride_block, stride_token,
            GROUP, BLOCK_G, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, NUM_STAGES,
        )  # fmt: skip
    members = tl.arange(0, BLOCK_G)
    cols = tl.arange(0, BLOCK_D)[None, :]
    mask = (members < GROUP)[:, None] & (cols < HEAD_DIM)
    row = request * (tl.num_programs(0) * GROUP) + first_head + members
    if SPLIT:
        row = row * num_splits + tl.program_id(2)
        tl.store(partial + row[:, None] * HEAD_DIM + cols, result, mask=mask)
        tl.store(partial_lse + row, lse, mask=members < GROUP)
    else:
        tl.store(out + row[:, None] * HEAD_DIM + cols, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["context_lens"])
def _combine_kernel(
    out,
    partial,
    partial_lse,
    context_lens,
    num_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    request = tl.program_id(1).to(tl.int64)
    context = tl.load(context_lens + request).to(tl.int32)
    chunk = _chunk(context, num_splits, CHUNK)
    used = (context + chunk - 1) // chunk
    row = request * tl.num_programs(0) + tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    top = _LOWEST
    total = 0.0
    acc = tl.full([BLOCK_D], 0.0, tl.float32)
    for first in tl.range(0, used, _SPLITS_AT_ONCE, num_stages=1):
        splits = first + tl.arange(0, _SPLITS_AT_ONCE)
        valid = splits < used
        parts = row * num_splits + splits
        lse = tl.load(partial_lse + parts, mask=valid, other=float("-inf"))
        mask = valid[:, None] & (cols < HEAD_DIM)[None, :]
        result = tl.load(partial + parts[:, None] * HEAD_DIM + cols[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(lse, 0))
        shrink = tl.exp2(top - new_top)
        weight = tl.exp2(lse - new_top)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(weight[:, None] * result, 0)
        top = new_top
    tl.store(out + row * HEAD_DIM + cols, (acc / total).to(out.dtype.element_ty), mask=cols < HEAD_DIM)


def attend_decodes(
    query: Tensor,
    cache: Tensor,
    layer: int,
    metadata: AttentionMetadata,
    scale: float,
    out: Tensor,
    *,
    tiling: DecodeTiling | None = None,
    num_splits: int | None = None,
) -> None:
    """Write the first `metadata.num_decodes` rows of `out`; shapes as in `Kernels.paged_attention`.

    Args:
        query: `[num_tokens, num_heads, head_dim]`.
        cache: any strides, with contiguous heads.
        layer: index of the layer in the cache.
        metadata: of the whole batch.
        scale: factor on the scores.
        out: `[num_tokens, num_heads, head_dim]`, contiguous.
        tiling: None: by `decode_tiling`.
        num_splits: None: by `split_count`.
    """
    num_decodes = metadata.num_decodes
    _, num_heads, head_dim = query.shape
    block_size, num_kv_heads = cache.shape[3:5]
    stride_block, stride_layer, stride_kv, stride_token, stride_head, _ = cache.stride()
    group = num_heads // num_kv_heads
    tables = metadata.block_tables
    if tiling is None:
        tiling = decode_tiling(query.dtype, head_dim, group)
    if num_splits is None:
        max_context = tables.shape[1] * block_size
        num_splits = split_count(num_decodes, num_kv_heads, max_context, chip(query.device).multiprocessors)
    block_d = power_of_two(head_dim)
    if tiling.use_dot:
        block_d = max(16, block_d)
    partial, partial_lse = out, out
    if num_splits > 1:
        partial = torch.empty((num_decodes, num_heads, num_splits, head_dim), dtype=torch.float32, device=out.device)
        partial_lse = torch.empty((num_decodes, num_heads, num_splits), dtype=torch.float32, device=out.device)
    _decode_kernel[(num_kv_heads, num_decodes, num_splits)](
        query,
        cache,
        out,
        partial,
        partial_lse,
        metadata.context_lens,
        tables,
        layer,
        num_splits,
        scale * math.log2(math.e),
        query.stride(0),
        query.stride(1),
        stride_block,
        stride_layer,
        stride_kv,
        stride_token,
        stride_head,
        tables.stride(0),
        GROUP=group,
        BLOCK_G=max(16, power_of_two(group)) if tiling.use_dot else 1,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_SIZE=block_size,
        BLOCK_N=tiling.block_n,
        CHUNK=MIN_CHUNK,
        SPLIT=num_splits > 1,
        NUM_STAGES=tiling.num_stages,
        num_warps=tiling.num_warps,
    )
    if num_splits > 1:
        _combine_kernel[(num_heads, num_decodes)](
            out,
            partial,
            partial_lse,
            metadata.context_lens,
            num_splits,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            CHUNK=MIN_CHUNK,
        )

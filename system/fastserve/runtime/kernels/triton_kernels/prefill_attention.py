"""Causal attention of several queries for each request on the paged cache, after a prefix if there is one."""

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

_LOWEST = tl.constexpr(-3.0e38)


@dataclass(frozen=True, slots=True)
class PrefillTiling:
    """The size of a program's work."""

    block_m: int
    """Queries of a program."""
    block_n: int
    """Tokens of the context for a step."""
    num_warps: int
    num_stages: int
    """Steps loaded ahead."""


@memoize
def prefill_tiling(dtype: torch.dtype, head_dim: int, major: int) -> PrefillTiling:
    """The tiling for heads of `head_dim` on a GPU of compute capability `major`: as large as the registers allow."""
    if dtype == torch.float32:
        return PrefillTiling(32, 32, 8, 1)
    if major < 9:
        return PrefillTiling(128, 64, 8, 2)
    return PrefillTiling(128, 64, 8 if head_dim > 64 else 4, 3)


@triton.jit
def _attend(
    acc,
    top,
    total,
    query,
    keys,
    stride_kv,
    table,
    positions,
    low,
    high,
    scale_log2,
    stride_block,
    stride_token,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over the tokens from `low` to `high`; unless MASKED, every query attends to all of them."""
    rows = tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    for start in tl.range(low, high, BLOCK_N):
        tokens = start + rows
        valid = tokens < high
        places = token_offsets(table, tokens, valid if MASKED else None, stride_block, stride_token, BLOCK_SIZE)
        offsets = places[:, None] + cols[None, :]
        if MASKED or HEAD_DIM != BLOCK_D:
            mask = (cols < HEAD_DIM)[None, :]
            if MASKED:
                mask = mask & valid[:, None]
            key = tl.load(keys + offsets, mask=mask, other=0.0)
            value = tl.load(keys + stride_kv + offsets, mask=mask, other=0.0)
        else:
            key = tl.load(keys + offsets)
            value = tl.load(keys + stride_kv + offsets)
        score = dot(query, tl.trans(key)) * scale_log2
        if MASKED:
            score = tl.where((tokens[None, :] <= positions[:, None]) & valid[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        shrink = tl.exp2(top - new_top)
        weight = tl.exp2(score - new_top[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None] + dot(weight.to(value.dtype), value)
        top = new_top
    return acc, top, total


@triton.jit(
    do_not_specialize=["first_request", "layer", "stride_table"],
    do_not_specialize_on_alignment=["query_starts", "context_lens", "block_tables"],
)
def _prefill_kernel(
    query,
    cache,
    out,
    query_starts,
    context_lens,
    block_tables,
    first_request,
    layer,
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
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Later queries attend to more tokens: start them first, so that no long program runs alone at the end.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1)
    request = (first_request + tl.program_id(2)).to(tl.int64)
    first_token = tl.load(query_starts + request)
    query_len = (tl.load(query_starts + request + 1) - first_token).to(tl.int32)
    if first_row >= query_len:
        return
    context = tl.load(context_lens + request).to(tl.int32)
    rows = first_row + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    positions = context - query_len + rows
    mask = (rows < query_len)[:, None] & (cols < HEAD_DIM)[None, :]
    tokens = first_token + rows
    queries = query + tokens[:, None] * stride_query_token + head * stride_query_head + cols[None, :]
    tile = tl.load(queries, mask=mask, other=0.0)
    keys = cache + layer.to(tl.int64) * stride_layer + (head // GROUP).to(tl.int64) * stride_head
    table = block_tables + request * stride_table

    acc = tl.full([BLOCK_M, BLOCK_D], 0.0, tl.float32)
    top = tl.full([BLOCK_M], _LOWEST, tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    seen_by_all = (context - query_len + first_row + 1) // BLOCK_N * BLOCK_N
    seen_by_any = tl.minimum(context - query_len + first_row + BLOCK_M, context)
    acc, top, total = _attend(
        acc, top, total, tile, keys, stride_kv, table, positions, 0, seen_by_all, scale_log2,
        stride_block, stride_token, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, False,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, tile, keys, stride_kv, table, positions, seen_by_all, seen_by_any, scale_log2,
        stride_block, stride_token, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, True,
    )  # fmt: skip
    results = out + (tokens[:, None] * tl.num_programs(1) + head) * HEAD_DIM + cols[None, :]
    tl.store(results, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)


def attend_prefills(
    query: Tensor,
    cache: Tensor,
    layer: int,
    metadata: AttentionMetadata,
    scale: float,
    out: Tensor,
    *,
    tiling: PrefillTiling | None = None,
) -> None:
    """Write the rows of `out` after the first `metadata.num_decodes`; shapes as in `Kernels.paged_attention`.

    Args:
        query: `[num_tokens, num_heads, head_dim]`.
        cache: any strides, with contiguous heads.
        layer: index of the layer in the cache.
        metadata: of the whole batch.
        scale: factor on the scores.
        out: `[num_tokens, num_heads, head_dim]`, contiguous.
        tiling: None: by `prefill_tiling`.
    """
    _, num_heads, head_dim = query.shape
    block_size, num_kv_heads = cache.shape[3:5]
    stride_block, stride_layer, stride_kv, stride_token, stride_head, _ = cache.stride()
    tables = metadata.block_tables
    if tiling is None:
        tiling = prefill_tiling(query.dtype, head_dim, chip(query.device).major)
    num_prefills = len(metadata.context_lens) - metadata.num_decodes
    _prefill_kernel[(-(-metadata.max_query_len // tiling.block_m), num_heads, num_prefills)](
        query,
        cache,
        out,
        metadata.query_starts,
        metadata.context_lens,
        tables,
        metadata.num_decodes,
        layer,
        scale * math.log2(math.e),
        query.stride(0),
        query.stride(1),
        stride_block,
        stride_layer,
        stride_kv,
        stride_token,
        stride_head,
        tables.stride(0),
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, power_of_two(head_dim)),
        BLOCK_SIZE=block_size,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )

"""Batches over a paged cache that is NaN wherever nothing was stored, and what attention over them should give."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fastserve.runtime.kernels import AttentionMetadata

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
LAYERS, LAYER = 3, 1


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Float64 attention of the last `len(query)` positions of one request; `[tokens, heads, head_dim]`."""
    query, key, value = (t.double().transpose(0, 1) for t in (query, key, value))
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scores = query @ key.transpose(1, 2) * scale
    queries, context = scores.shape[1:]
    future = torch.arange(context) > torch.arange(context - queries, context).unsqueeze(1)
    return (scores.masked_fill(future.to(scores.device), -math.inf).softmax(-1) @ value).transpose(0, 1)


def relative_error(out: Tensor, wanted: Tensor) -> float:
    return ((out.double() - wanted).norm() / wanted.norm()).item()


@dataclass
class Batch:
    """Requests whose keys and values lie in the cache; decodes first."""

    cache: Tensor
    query: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    metadata: AttentionMetadata
    scale: float

    def errors(self, out: Tensor) -> list[float]:
        """Of each request."""
        parts = out.split(self.metadata.host_query_lens), self.query.split(self.metadata.host_query_lens)
        return [
            relative_error(got, dense(query, key, value, self.scale))
            for got, query, key, value in zip(*parts, self.keys, self.values, strict=True)
        ]


def permuted(shape: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN of `shape`, with its dimensions in memory in `order`."""
    memory = torch.full([shape[dim] for dim in order], math.nan, dtype=dtype, device=device)
    return memory.permute([order.index(dim) for dim in range(len(order))])


def make_batch(
    device: torch.device,
    decodes: list[int],
    prefills: list[tuple[int, int]],
    *,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    block_size: int = 16,
    order: tuple[int, ...] = (0, 1, 2, 3, 4, 5),
) -> Batch:
    """Requests by context length, and by (context before, query tokens); `heads`: query heads, KV heads, head_dim."""
    num_heads, num_kv_heads, head_dim = heads
    query_lens = [1] * len(decodes) + [new for _, new in prefills]
    contexts = decodes + [before + new for before, new in prefills]
    needed = [-(-context // block_size) for context in contexts]
    # Block 0 pads the tables and stores nothing: a kernel that reads beyond a context finds NaN.
    free = (torch.randperm(sum(needed) + 2) + 1).tolist()
    shape = (len(free) + 1, LAYERS, 2, block_size, num_kv_heads, head_dim)
    cache = permuted(shape, order, dtype, device)
    tables = [[free.pop() for _ in range(count)] for count in needed]
    keys = [torch.randn(context, num_kv_heads, head_dim, device=device).to(dtype) for context in contexts]
    values = [torch.randn(context, num_kv_heads, head_dim, device=device).to(dtype) for context in contexts]
    # Queries are what a fused projection leaves: some heads of wider rows.
    fused = torch.randn(sum(query_lens), num_heads + 2 * num_kv_heads, head_dim, device=device).to(dtype)
    for table, key, value in zip(tables, keys, values, strict=True):
        position = torch.arange(len(key), device=device)
        blocks, offsets = torch.tensor(table, device=device)[position // block_size], position % block_size
        cache[blocks, LAYER, 0, offsets], cache[blocks, LAYER, 1, offsets] = key, value
    width = max(needed) + 2
    block_tables = torch.tensor([table + [0] * (width - len(table)) for table in tables], device=device)
    metadata = AttentionMetadata(
        num_decodes=len(decodes),
        max_query_len=max(query_lens),
        query_starts=torch.tensor([0, *accumulate(query_lens)], device=device),
        context_lens=torch.tensor(contexts, device=device),
        block_tables=block_tables,
        host_query_lens=query_lens,
        host_context_lens=contexts,
    )
    return Batch(cache, fused[:, :num_heads], keys, values, metadata, head_dim**-0.5)

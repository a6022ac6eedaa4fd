"""Kernels in plain torch: for CPUs, and the reference for Triton's; see `fastserve.runtime.kernels.Kernels`."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastserve.runtime.kernels.metadata import AttentionMetadata

loops_on_host = True

_QUERIES_AT_A_TIME = 64
"""Queries of a prompt computed at a time: more waste work on masked scores, fewer are less efficient."""


def store_kv(cache: Tensor, layer: int, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
    """Store one key and one value per token in the cache."""
    _, num_layers, _, block_size, num_kv_heads, head_dim = cache.shape
    rows = cache.view(-1, num_kv_heads * head_dim)
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    key_rows = (block * num_layers + layer) * (2 * block_size) + offset
    rows.index_copy_(0, key_rows, key.flatten(1))
    rows.index_copy_(0, key_rows + block_size, value.flatten(1))


def paged_attention(query: Tensor, cache: Tensor, layer: int, metadata: AttentionMetadata, scale: float) -> Tensor:
    """Attend each query token to its request's context.

    Computes scores in float32 for any type of cache: more exact, and on a CPU faster than bfloat16 for a single query.
    """
    _, num_layers, _, block_size, num_kv_heads, head_dim = cache.shape
    contexts = _find_contexts(metadata, num_layers, block_size, query.shape[1], num_kv_heads)
    keys = cache.view(-1, num_kv_heads, head_dim)[2 * block_size * layer :]
    values = keys[block_size:]
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    queries = query.float() * scale
    start = metadata.num_decodes
    if start:
        output[:start] = _attend_ones(queries[:start], keys, values, contexts)
    for query_len, rows in zip(metadata.host_query_lens[start:], contexts.rows[start:], strict=True):
        key, value = (vectors.index_select(0, rows).float().transpose(0, 1) for vectors in (keys, values))
        output[start : start + query_len] = _attend_many(queries[start : start + query_len], key, value)
        start += query_len
    return output


class _Contexts(NamedTuple):
    """Rows of a batch's contexts, in a cache seen as rows of one token's keys or values.

    Rows are those of the first layer's keys; other layers and the values have a constant offset.
    """

    rows: list[Tensor]
    """Rows of each request: `[context_len]`."""
    vectors: Tensor
    """Rows, one for each KV head, that each query head of the decodes attends to, request by request."""
    starts: Tensor
    """`[num_decodes * num_heads]`: index of each query head's first entry in `vectors`."""


@lru_cache(maxsize=1)
def _find_contexts(
    metadata: AttentionMetadata, num_layers: int, block_size: int, num_heads: int, num_kv_heads: int
) -> _Contexts:
    """Find the contexts; cached, since all layers of an iteration use the same."""
    tables, lengths = metadata.block_tables, metadata.host_context_lens
    offsets = torch.arange(block_size, device=tables.device)
    slots = (tables.unsqueeze(2) * (num_layers * 2 * block_size) + offsets).flatten(1)
    # Cut instead of masking: values beyond the context may be NaN.
    rows = [row[:length] for row, length in zip(slots.unbind(0), lengths, strict=True)]
    heads = torch.arange(num_heads, device=tables.device).unsqueeze(1) // (num_heads // num_kv_heads)
    vectors = [(row * num_kv_heads + heads).flatten() for row in rows[: metadata.num_decodes]]
    starts = torch.tensor(
        [0, *accumulate(length for length in lengths[: metadata.num_decodes] for _ in range(num_heads))]
    )
    return _Contexts(rows, torch.cat(vectors) if vectors else starts, starts[:-1].to(tables.device))


def _attend_ones(queries: Tensor, keys: Tensor, values: Tensor, contexts: _Contexts) -> Tensor:
    """Attend queries of one token each, `[requests, num_heads, head_dim]`, to the layer's keys and values."""
    num_requests, _, head_dim = queries.shape
    grouped = queries.view(num_requests, keys.shape[1], -1, head_dim)
    weights = []
    for query, rows in zip(grouped.unbind(0), contexts.rows, strict=False):
        key = keys.index_select(0, rows).float()
        weights.append(torch.bmm(query, key.permute(1, 2, 0)).softmax(-1).flatten())
    # A weighted sum of table rows for each head of each request, without gathering the values.
    attended = F.embedding_bag(
        contexts.vectors,
        values.view(-1, head_dim),
        contexts.starts,
        mode="sum",
        per_sample_weights=torch.cat(weights).to(values.dtype),
    )
    return attended.view(queries.shape)


def _attend_many(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend queries `[query_len, num_heads, head_dim]` to a context `[num_kv_heads, context_len, head_dim]`."""
    query_len, context_len = query.shape[0], key.shape[1]
    group = query.shape[1] // key.shape[0]
    if group > 1:
        key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    query, key, value = query.transpose(0, 1).unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    attended = []
    # Some at a time, since torch also computes masked scores.
    for first in range(0, query_len, _QUERIES_AT_A_TIME):
        some = query[:, :, first : first + _QUERIES_AT_A_TIME]
        seen = context_len - query_len + first + some.shape[2]
        mask = torch.ones(some.shape[2], seen, dtype=torch.bool, device=query.device).tril(seen - some.shape[2])
        attended.append(
            F.scaled_dot_product_attention(some, key[:, :, :seen], value[:, :, :seen], attn_mask=mask, scale=1.0)
        )
    return torch.cat(attended, 2).squeeze(0).transpose(0, 1)


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Add and normalize."""
    if residual is not None:
        x = x.add_(residual)
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, eps), x
    return F.layer_norm(x, weight.shape, weight, bias, eps), x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding."""
    turned = x.roll(x.shape[-1] // 2, -1)
    return x.mul_(cos).addcmul_(turned, sin)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def load_decodes(
    packed: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    block_size: int,
) -> None:
    """Fill the inputs of a decode batch."""
    token_ids.copy_(packed[:, 0])
    positions.copy_(packed[:, 1])
    block_tables.copy_(packed[:, 2:])
    block = block_tables.gather(1, (positions // block_size).unsqueeze(1)).squeeze(1)
    slot_mapping.copy_(block * block_size + positions % block_size)
    context_lens.copy_(positions + 1)


def exchange(source: Tensor, destination: Tensor) -> None:
    """Copy integers between device and host."""
    destination[: len(source)].copy_(source, non_blocking=True)

"""Causal attention of a flat batch of query tokens over the paged cache: the torch reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where each request's queries lie in the flat batch and its context in the cache. Lists are for the host, tensors
    (int64, on the model's device) for kernels; request `i` is the same in all of them. Decodes come first.
    """

    query_lens: list[int]
    context_lens: list[int]
    """Tokens in the cache after this step, the queries' own included."""
    num_decodes: int
    """The first so many requests have exactly one query token."""
    query_starts: Tensor
    """`[num_requests + 1]`: the first query token of each request, and the total."""
    context_lens_device: Tensor
    """`[num_requests]`: `context_lens` on the device."""
    block_tables: Tensor
    """`[num_requests, max_blocks]`, padded with zeros, which no one may read."""
    blocks: list[Tensor]
    """Each request's row of `block_tables` without the padding."""


def paged_attention(query: Tensor, cache: Tensor, layer: int, metadata: AttentionMetadata, scale: float) -> Tensor:
    """Attend each query token to its request's context up to and including its own position.

    A request with a prefix in the cache (a decode, a later chunk of a prompt) has `query_len < context_len`: its
    queries are the last positions of the context. Keys and values of the queries themselves must already be stored.
    Computed in float32 whatever the cache's type: more exact, and on a CPU faster than bfloat16 for a single query.

    Args:
        query: `[num_tokens, num_heads, head_dim]`; `num_heads` is a multiple of the cache's KV heads (GQA).
        cache: `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`.
        layer: which layer of the cache to read.
        metadata: lengths and block tables.
        scale: factor on the scores, usually `head_dim ** -0.5`.

    Returns:
        `[num_tokens, num_heads, head_dim]` in the type of `query`. No slot beyond a context's length is read.
    """
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    keys, values = cache[:, layer, 0], cache[:, layer, 1]
    queries = query.float() * scale
    start = 0
    for query_len, context_len, blocks in zip(metadata.query_lens, metadata.context_lens, metadata.blocks, strict=True):
        # Cutting the gathered blocks at the context's length beats masking: what lies in the tail may be NaN.
        key = keys.index_select(0, blocks).flatten(0, 1)[:context_len].float().transpose(0, 1)
        value = values.index_select(0, blocks).flatten(0, 1)[:context_len].float().transpose(0, 1)
        own = slice(start, start + query_len)
        attend = _attend_one if query_len == 1 else _attend_many
        output[own] = attend(queries[own], key, value)
        start += query_len
    return output


def _attend_one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One query token `[1, num_heads, head_dim]`; key and value `[num_kv_heads, context_len, head_dim]`."""
    grouped = query.view(key.shape[0], -1, query.shape[-1])
    weights = torch.bmm(grouped, key.transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, value).view(query.shape)


def _attend_many(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Several query tokens `[query_len, num_heads, head_dim]` at the end of the context."""
    query_len, context_len = query.shape[0], key.shape[1]
    group = query.shape[1] // key.shape[0]
    if group > 1:
        key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    mask = None
    if query_len < context_len:
        mask = torch.ones(query_len, context_len, dtype=torch.bool, device=query.device)
        mask = mask.tril(context_len - query_len)
    attended = F.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        key.unsqueeze(0),
        value.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=1.0,
    )
    return attended.squeeze(0).transpose(0, 1)

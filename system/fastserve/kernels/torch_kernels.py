"""The kernels in plain torch: what a CPU runs, and the reference for Triton's. `fastserve.kernels.Kernels` says what
each does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastserve.kernels.metadata import AttentionMetadata

loops_on_host = True


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

    Computed in float32 whatever the cache's type: more exact, and on a CPU faster than bfloat16 for a single query.
    """
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    keys, values = cache[:, layer, 0], cache[:, layer, 1]
    queries = query.float() * scale
    start = 0
    for query_len, context_len, blocks in zip(
        metadata.host_query_lens, metadata.host_context_lens, metadata.host_blocks, strict=True
    ):
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
    half = x.shape[-1] // 2
    return x * cos + x.roll(half, -1) * sin


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

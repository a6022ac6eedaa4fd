"""Store keys and values in the paged cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastserve.runtime.kernels.triton_kernels.primitives import power_of_two


@triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=["slot_mapping"])
def _store_kernel(
    cache,
    key,
    value,
    slot_mapping,
    layer,
    stride_block,
    stride_layer,
    stride_kv,
    stride_token,
    stride_head,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    mask = (heads < NUM_HEADS) & (cols < HEAD_DIM)
    target = cache + layer.to(tl.int64) * stride_layer
    target += slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_token
    target += heads * stride_head + cols
    keys = tl.load(key + token * stride_key_token + heads * stride_key_head + cols, mask=mask)
    values = tl.load(value + token * stride_value_token + heads * stride_value_head + cols, mask=mask)
    tl.store(target, keys, mask=mask)
    tl.store(target + stride_kv, values, mask=mask)


def store_kv(cache: Tensor, layer: int, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
    """Store one key and one value per token in the cache."""
    num_tokens, num_heads, head_dim = key.shape
    stride_block, stride_layer, stride_kv, stride_token, stride_head, _ = cache.stride()
    block_d = power_of_two(head_dim)
    heads = min(power_of_two(num_heads), max(1, 1024 // block_d))
    _store_kernel[(num_tokens, -(-num_heads // heads))](
        cache,
        key,
        value,
        slot_mapping,
        layer,
        stride_block,
        stride_layer,
        stride_kv,
        stride_token,
        stride_head,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=cache.shape[3],
        HEADS=heads,
        BLOCK_D=block_d,
    )

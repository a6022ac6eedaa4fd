"""Write new keys and values into the paged cache."""

from __future__ import annotations

from torch import Tensor


def store_kv(cache: Tensor, layer: int, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
    """Store one key and one value per token, in place.

    Args:
        cache: `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`, contiguous.
        layer: which layer of the cache the tokens belong to.
        key: `[num_tokens, num_kv_heads, head_dim]`; may be a strided view.
        value: the same shape as `key`.
        slot_mapping: `[num_tokens]` int64, `block_id * block_size + offset` of each token; no slot twice.
    """
    _, num_layers, _, block_size, num_kv_heads, head_dim = cache.shape
    rows = cache.view(-1, num_kv_heads * head_dim)
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    key_rows = (block * num_layers + layer) * (2 * block_size) + offset
    rows.index_copy_(0, key_rows, key.flatten(1))
    rows.index_copy_(0, key_rows + block_size, value.flatten(1))

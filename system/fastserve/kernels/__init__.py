"""Attention over the paged KV cache, and writes into it.

Its layout is `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`: a block is one contiguous span over
all layers, so that swapping it is one large copy. These are the torch references.
"""

from fastserve.kernels.kv_store import store_kv
from fastserve.kernels.paged_attention import AttentionMetadata, paged_attention

__all__ = ["AttentionMetadata", "paged_attention", "store_kv"]

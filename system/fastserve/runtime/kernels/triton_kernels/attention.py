"""Attention on the paged cache: one kernel for decodes, another for the rest of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve.runtime.kernels.metadata import AttentionMetadata
from fastserve.runtime.kernels.triton_kernels.decode_attention import attend_decodes
from fastserve.runtime.kernels.triton_kernels.prefill_attention import attend_prefills


def paged_attention(query: Tensor, cache: Tensor, layer: int, metadata: AttentionMetadata, scale: float) -> Tensor:
    """Attend each query token to its request's context."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if metadata.num_decodes > 0:
        attend_decodes(query, cache, layer, metadata, scale, out)
    if metadata.num_decodes < len(metadata.context_lens):
        attend_prefills(query, cache, layer, metadata, scale, out)
    return out

"""What a model computes besides matrix products, in two sets of the same functions: plain torch, and Triton for GPUs.

The cache's layout is `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`: a block is one contiguous span
over all layers, so that swapping it is one large copy.
"""

from __future__ import annotations

import importlib
import os
from typing import Protocol, cast

import torch
from torch import Tensor

from fastserve.core.errors import ConfigError
from fastserve.runtime.kernels.metadata import AttentionMetadata

__all__ = ["AttentionMetadata", "Kernels", "kernels_for"]

_SETS = {"torch": "fastserve.runtime.kernels.torch_kernels", "triton": "fastserve.runtime.kernels.triton_kernels"}


class Kernels(Protocol):
    """A set of kernels. Tensors are of one floating type and on one device; int64 where they hold indices."""

    loops_on_host: bool
    """Whether attention reads the host's fields of the metadata, so that a CUDA graph cannot capture it."""

    def store_kv(self, cache: Tensor, layer: int, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Store one key and one value per token in the cache, in place.

        Args:
            cache: `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`, contiguous.
            layer: which layer of the cache the tokens belong to.
            key: `[num_tokens, num_kv_heads, head_dim]`; may be a strided view, of contiguous heads.
            value: the same shape as `key`.
            slot_mapping: `[num_tokens]`, `block_id * block_size + offset` of each token.
        """

    def paged_attention(
        self, query: Tensor, cache: Tensor, layer: int, metadata: AttentionMetadata, scale: float
    ) -> Tensor:
        """Attend each query token to its request's context up to and including its own position.

        A request with a prefix in the cache (a decode, a later chunk of a prompt) has fewer queries than context: its
        queries are the last positions of the context. Their keys and values must already be stored.

        Args:
            query: `[num_tokens, num_heads, head_dim]`; `num_heads` is a multiple of the cache's KV heads (GQA). May be
                a strided view, of contiguous heads.
            cache: as for `store_kv`. No slot beyond a context's length is read.
            layer: which layer of the cache to read.
            metadata: lengths and block tables.
            scale: factor on the scores, usually `head_dim ** -0.5`.

        Returns:
            `[num_tokens, num_heads, head_dim]`, contiguous, in the type of `query`.
        """

    def add_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Add and normalize: `x + residual`, and its layer norm (with `bias`) or RMS norm (without).

        Args:
            x: `[rows, hidden_size]`, contiguous; may be overwritten.
            residual: the same shape, or None for nothing to add.
            weight: `[hidden_size]`.
            bias: `[hidden_size]`, or None.
            eps: added to the variance or the mean square.

        Returns:
            The norm, and the sum, each `[rows, hidden_size]`.
        """

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding of `[num_tokens, heads, head_dim]` by `[num_tokens, 1, head_dim]` cosines and sines.

        Dimension i turns together with i + head_dim / 2 (the checkpoints' convention); the first half of `sin` is
        negated. `x` may be a strided view, of contiguous heads, and may be overwritten.
        """

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """`silu(gate) * up` of `[rows, 2 * inner]`, the gate first: `[rows, inner]`."""

    def load_decodes(
        self,
        packed: Tensor,
        token_ids: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        context_lens: Tensor,
        block_tables: Tensor,
        block_size: int,
    ) -> None:
        """Fill the inputs of a decode batch, in place, from what the host wrote.

        Args:
            packed: `[rows, 2 + max_blocks]`, in page-locked host memory or on the device: a token, its position, and
                the request's block table, of which the blocks up to the position's are read.
            token_ids: `[rows]`, to fill; so are
            positions: `[rows]`,
            slot_mapping: `[rows]`,
            context_lens: `[rows]`, the position plus one, and
            block_tables: `[rows, max_blocks]`.
            block_size: tokens per block.
        """

    def exchange(self, source: Tensor, destination: Tensor) -> None:
        """Copy `[count]` integers to the first of `destination`, between the device and page-locked host memory.

        Does not wait, so the caller keeps both until it has waited. For a GPU this is a kernel that reaches over the
        link: a copy of these few bytes would queue behind those of swapping.
        """


def kernels_for(device: torch.device) -> Kernels:
    """Triton's set on a GPU, torch's elsewhere, or the one that the variable FASTSERVE_KERNELS names.

    Triton's runs on a CPU only with TRITON_INTERPRET=1 in the environment, slowly, to be tested.
    """
    name = os.environ.get("FASTSERVE_KERNELS") or ("triton" if device.type == "cuda" else "torch")
    if name not in _SETS:
        raise ConfigError(f"FASTSERVE_KERNELS={name!r} is no set of kernels; known: {', '.join(_SETS)}")
    if name == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"FASTSERVE_KERNELS=triton on {device}: set TRITON_INTERPRET=1 as well, or leave it out")
    try:
        return cast(Kernels, importlib.import_module(_SETS[name]))
    except ImportError as error:
        raise ConfigError(f"the {name} kernels need a package that is not there ({error}); install it") from None

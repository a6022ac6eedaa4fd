"""Kernels: what a model computes besides matrix products, in plain torch and in Triton for GPUs.

The layout of the cache is `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`: a block is contiguous over
all layers, so that swapping it is one large copy.
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
    """A set of kernels. Tensors are on one device and have one floating type, or int64 for indices."""

    loops_on_host: bool
    """Whether attention reads the metadata's host fields, so that a CUDA graph cannot capture it."""

    def store_kv(self, cache: Tensor, layer: int, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Store one key and one value per token in the cache, in place.

        Args:
            cache: `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`, contiguous.
            layer: index of the layer in the cache.
            key: `[num_tokens, num_kv_heads, head_dim]`; may be a strided view with contiguous heads.
            value: the same shape as `key`.
            slot_mapping: `[num_tokens]`, `block_id * block_size + offset` of each token.
        """

    def paged_attention(
        self, query: Tensor, cache: Tensor, layer: int, metadata: AttentionMetadata, scale: float
    ) -> Tensor:
        """Attend each query token to its request's context up to and including its own position.

        If a prefix is in the cache (a decode, a later chunk of a prompt), a request's queries are the last positions of
        its context. Their keys and values must already be stored.

        Args:
            query: `[num_tokens, num_heads, head_dim]`; `num_heads` is a multiple of the cache's KV heads (GQA). May be
                a strided view with contiguous heads.
            cache: as for `store_kv`. Slots beyond a context's length are not read.
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
            residual: the same shape; None adds nothing.
            weight: `[hidden_size]`.
            bias: `[hidden_size]`, or None.
            eps: added to the variance or the mean square.

        Returns:
            The norm, and the sum, each `[rows, hidden_size]`.
        """

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding of `[num_tokens, heads, head_dim]` by `[num_tokens, 1, head_dim]` cosines and sines.

        Dimension i is paired with i + head_dim / 2, as in the checkpoints; the first half of `sin` is negated. `x` may
        be a strided view with contiguous heads, and may be overwritten.
        """

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """`silu(gate) * up`, `[rows, inner]`, of `[rows, 2 * inner]` with the gate first."""

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
        """Fill the inputs of a decode batch, in place, from rows that the host wrote.

        Args:
            packed: `[rows, 2 + max_blocks]`, in page-locked host memory or on the device: a token, its position, and
                the request's block table, which is read up to the position's block.
            token_ids: output, `[rows]`.
            positions: output, `[rows]`.
            slot_mapping: output, `[rows]`.
            context_lens: output, `[rows]`, the position plus one.
            block_tables: output, `[rows, max_blocks]`.
            block_size: tokens per block.
        """

    def exchange(self, source: Tensor, destination: Tensor) -> None:
        """Copy `[count]` integers to the start of `destination`, between the device and page-locked host memory.

        Does not wait: keep both tensors until the device is done. On a GPU it is a kernel that accesses host memory,
        since a copy would queue behind swaps.
        """


def kernels_for(device: torch.device) -> Kernels:
    """Triton's kernels on a GPU, torch's elsewhere, or those that the variable FASTSERVE_KERNELS names.

    On a CPU, Triton's need TRITON_INTERPRET=1 in the environment and are slow: for tests. ConfigError otherwise.
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

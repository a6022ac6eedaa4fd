"""Layers that the model families share, and the names of their weights in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastserve.runtime.kernels import AttentionMetadata
from fastserve.runtime.models.part import Part, Share, Weight

_PACK_ROWS = 16
"""Rows for which oneDNN lays out a packed weight: a decode batch. Prefills gain less from that layout."""


class Linear(nn.Module):
    """`x @ weight.T + bias`, with weight `[out_features, in_features]`, followed by ReLU if `relu`.

    A shard with some of the weight's rows computes those outputs. A shard with some of its columns takes those inputs
    and computes a summand: an all-reduce adds the shards' results, and only shard 0 has the bias.

    Args:
        part: what the rank builds.
        columns: of the weight.
        rows: of each projection that is fused in the weight, as `(("q_proj", …), ("k_proj", …), …)`.
        bias: whether there is a bias.
        relu: whether ReLU follows; not for shards of columns.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self, part: Part, columns: Share, rows: tuple[tuple[str, Share], ...], *, bias: bool, relu: bool = False
    ) -> None:
        super().__init__()
        self.columns = columns
        self.rows = rows
        self.relu = relu
        self.group = None if columns.is_whole else part.group
        num_rows = sum(len(share.held) for _, share in rows)
        has_bias = bias and (columns.is_whole or part.place.shard == 0)
        self.register_buffer("weight", part.empty(num_rows, len(columns.held)))
        self.register_buffer("bias", part.empty(num_rows) if has_bias else None)
        self._packed: Tensor | None = None
        self.few_rows: dict[int, Callable[[Tensor], Tensor]] = {}
        """By number of input rows: our kernel, where it is faster than the library (`linear_tuning`)."""

    def weights(self, prefix: str) -> Iterator[Weight]:
        """The checkpoint's tensors under `prefix`, each with the rows that it fills."""
        sizes = [len(share.held) for _, share in self.rows]
        for kind, tensor in (("weight", self.weight), ("bias", self.bias)):
            if tensor is not None:
                for (name, share), rows in zip(self.rows, tensor.split(sizes), strict=True):
                    dim, held = (0, share) if kind == "bias" or self.columns.is_whole else (1, self.columns)
                    yield Weight(f"{prefix}{name}.{kind}", rows, dim, held)

    def pack(self) -> None:
        """Convert the weight to oneDNN's blocked layout: on a CPU, a decode batch computes about twice as fast.

        Afterwards the weight can no longer be read. Does nothing where oneDNN does not support it.
        """
        weight = self.weight
        if weight is None or weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
            return
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
            probe = torch.zeros(1, weight.shape[1], dtype=weight.dtype)
            torch.ops.mkldnn._linear_pointwise(probe, packed, self.bias, self._epilogue, [], "")
        except (AttributeError, RuntimeError, NotImplementedError):  # a build or a processor without it
            return
        self._packed, self.weight = packed, None

    @property
    def _epilogue(self) -> str:
        """What oneDNN applies to the product."""
        return "relu" if self.relu else "none"

    def forward(self, x: Tensor) -> Tensor:
        """Map `[rows, in_features]` to `[rows, out_features]`."""
        compute = self.few_rows.get(x.shape[0], self.library)
        return compute(x) if self.group is None else self.group.all_reduce(compute(x))

    def library(self, x: Tensor) -> Tensor:
        """Compute this shard's result with the library's kernel, for any number of rows."""
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, self._epilogue, [], "")
        assert self.weight is not None
        if not self.relu:
            return F.linear(x, self.weight, self.bias)
        if self.bias is None or not x.is_cuda:
            return F.linear(x, self.weight, self.bias).relu_()
        # On a GPU, fuse bias and ReLU with the product instead of two more passes over its result.
        return torch._addmm_activation(self.bias, x, self.weight.t())


class Norm(nn.Module):
    """Layer norm (with bias) or RMS norm over the last dimension."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, part: Part, *, rms: bool) -> None:
        super().__init__()
        self.eps = part.config.norm_eps
        self.kernels = part.kernels
        self.register_buffer("weight", part.empty(part.config.hidden_size))
        self.register_buffer("bias", None if rms else part.empty(part.config.hidden_size))

    def weights(self, name: str) -> Iterator[Weight]:
        """The checkpoint's tensors of the norm `name`."""
        yield Weight(f"{name}.weight", self.weight)
        if self.bias is not None:
            yield Weight(f"{name}.bias", self.bias)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the norm of `x + residual`, and that sum; `x` may be overwritten."""
        return self.kernels.add_norm(x, residual, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Fused QKV projection, rotary embedding if there is one, paged attention and output projection."""

    def __init__(self, part: Part, *, out_name: str, bias: bool) -> None:
        super().__init__()
        self.head_dim = part.config.head_dim
        self.kernels = part.kernels
        projections = (("q_proj", part.heads), ("k_proj", part.kv_heads), ("v_proj", part.kv_heads))
        self.heads = [len(share.held) // self.head_dim for _, share in projections]
        self.qkv = Linear(part, part.hidden, projections, bias=bias)
        self.out = Linear(part, part.heads, ((out_name, part.hidden),), bias=bias)

    def weights(self, prefix: str) -> Iterator[Weight]:
        """The checkpoint's tensors under `prefix`."""
        yield from self.qkv.weights(prefix)
        yield from self.out.weights(prefix)

    def forward(
        self,
        x: Tensor,
        cache: Tensor,
        layer: int,
        slot_mapping: Tensor,
        metadata: AttentionMetadata,
        rotary: tuple[Tensor, Tensor] | None,
        keep: Tensor | None,
    ) -> Tensor:
        """Map `[num_tokens, hidden_size]` to the same shape, or to the rows `keep` only."""
        qkv = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        num_heads, num_kv_heads, _ = self.heads
        if rotary is not None:
            rotated = self.kernels.rotate(qkv[:, : num_heads + num_kv_heads], *rotary)
            query, key = rotated.split(self.heads[:2], dim=1)
            value = qkv[:, num_heads + num_kv_heads :]
        else:
            query, key, value = qkv.split(self.heads, dim=1)
        self.kernels.store_kv(cache, layer, key, value, slot_mapping)
        attended = self.kernels.paged_attention(query, cache, layer, metadata, self.head_dim**-0.5).flatten(1)
        return self.out(attended if keep is None else attended[keep])

"""Layers the model families share, and the names under which a checkpoint keeps their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastserve.config import ModelConfig
from fastserve.kernels import AttentionMetadata, kernels_for

_PACK_ROWS = 16
"""Rows oneDNN lays a packed weight out for: a decode batch. Prefills gain from the same layout, if less."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a checkpoint and the place it fills: a whole parameter, or some rows of a fused one."""

    name: str
    target: Tensor


class Linear(nn.Module):
    """`x @ weight.T + bias`, weight `[out_features, in_features]`, and with `relu` what is left of it above 0.

    `parts` name the projections fused in it, with their rows, as `(("q_proj", 64), ("k_proj", 32), …)`.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        parts: tuple[tuple[str, int], ...],
        *,
        bias: bool,
        relu: bool = False,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.parts = parts
        self.relu = relu
        rows = sum(size for _, size in parts)
        self.register_buffer("weight", torch.empty(rows, in_features, dtype=dtype, device=device))
        self.register_buffer("bias", torch.empty(rows, dtype=dtype, device=device) if bias else None)
        self._packed: Tensor | None = None
        self.few_rows: dict[int, Callable[[Tensor], Tensor]] = {}
        """What computes inputs of exactly so many rows instead of the library (`linear_tuning`)."""

    def weights(self, prefix: str) -> Iterator[Weight]:
        """The checkpoint's tensors under `prefix`, each with the rows it fills."""
        sizes = [size for _, size in self.parts]
        for kind, tensor in (("weight", self.weight), ("bias", self.bias)):
            if tensor is not None:
                for (name, _), rows in zip(self.parts, tensor.split(sizes), strict=True):
                    yield Weight(f"{prefix}{name}.{kind}", rows)

    def pack(self) -> None:
        """Trade the weight for oneDNN's blocked layout: on a CPU, GEMMs of a decode batch run about twice as fast.

        Does nothing where that is not offered. The layer then only runs; its weights can no longer be read.
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
        """What oneDNN does to the product."""
        return "relu" if self.relu else "none"

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, in_features]` to `[rows, out_features]`."""
        compute = self.few_rows.get(x.shape[0], self.library)
        return compute(x)

    def library(self, x: Tensor) -> Tensor:
        """The same by the library's kernel, whatever the number of rows."""
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, self._epilogue, [], "")
        assert self.weight is not None
        if not self.relu:
            return F.linear(x, self.weight, self.bias)
        if self.bias is None or not x.is_cuda:
            return F.linear(x, self.weight, self.bias).relu_()
        # On a GPU bias and ReLU are part of the matrix product, not two more passes over its result.
        return torch._addmm_activation(self.bias, x, self.weight.t())


class Norm(nn.Module):
    """Layer norm (with bias) or RMS norm over the last dimension."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, size: int, eps: float, *, rms: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.kernels = kernels_for(device)
        self.register_buffer("weight", torch.empty(size, dtype=dtype, device=device))
        self.register_buffer("bias", None if rms else torch.empty(size, dtype=dtype, device=device))

    def weights(self, name: str) -> Iterator[Weight]:
        """The checkpoint's tensors of the norm called `name`."""
        yield Weight(f"{name}.weight", self.weight)
        if self.bias is not None:
            yield Weight(f"{name}.bias", self.bias)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of `x + residual`, and that sum; `x` may be overwritten."""
        return self.kernels.add_norm(x, residual, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Fused QKV projection, rotary embedding where given, paged attention and output projection."""

    def __init__(
        self, config: ModelConfig, *, out_name: str, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        hidden_size, head_dim = config.hidden_size, config.head_dim
        self.heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self.head_dim = head_dim
        self.kernels = kernels_for(device)
        parts = tuple((f"{n}_proj", h * head_dim) for n, h in zip("qkv", self.heads, strict=True))
        self.qkv = Linear(hidden_size, parts, bias=bias, dtype=dtype, device=device)
        self.out = Linear(
            config.num_heads * head_dim, ((out_name, hidden_size),), bias=bias, dtype=dtype, device=device
        )

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
        """`[num_tokens, hidden_size]` to the same, or to the rows of `keep` alone."""
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

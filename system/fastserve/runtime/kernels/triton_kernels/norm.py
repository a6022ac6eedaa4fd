"""Add the residual and normalize, in one pass over the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastserve.runtime.kernels.triton_kernels.primitives import power_of_two


@triton.jit
def _add_norm_kernel(
    x,
    residual,
    weight,
    bias,
    normed,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * HIDDEN
    cols = tl.arange(0, BLOCK)
    mask = cols < HIDDEN
    row = tl.load(x + first + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        row += tl.load(residual + first + cols, mask=mask, other=0.0).to(tl.float32)
        rounded = row.to(x.dtype.element_ty)
        tl.store(x + first + cols, rounded, mask=mask)
        row = rounded.to(tl.float32)
    if HAS_BIAS:
        row = tl.where(mask, row - tl.sum(row, 0) / HIDDEN, 0.0)
    scaled = row / tl.sqrt(tl.sum(row * row, 0) / HIDDEN + eps)
    scaled *= tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        scaled += tl.load(bias + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + first + cols, scaled.to(normed.dtype.element_ty), mask=mask)


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Add and normalize; the sum, rounded to the type of `x`, replaces `x`."""
    rows, hidden = x.shape
    normed = torch.empty_like(x)
    block = power_of_two(hidden)
    _add_norm_kernel[(rows,)](
        x,
        x if residual is None else residual,
        weight,
        weight if bias is None else bias,
        normed,
        eps,
        HIDDEN=hidden,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        num_warps=max(1, min(16, block // 512)),
    )
    return normed, x

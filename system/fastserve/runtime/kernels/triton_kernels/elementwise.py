"""Rotary embedding and the gated activation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastserve.runtime.kernels.triton_kernels.primitives import power_of_two


@triton.jit
def _rotate_kernel(
    x,
    cos,
    sin,
    stride_token,
    stride_head,
    stride_angle,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    cols = tl.arange(0, BLOCK)
    used = cols < HALF
    cos += token * stride_angle
    sin += token * stride_angle
    low = x + token * stride_token + heads * stride_head + cols[None, :]
    high = low + HALF
    mask = (heads < NUM_HEADS) & used[None, :]
    first = tl.load(low, mask=mask).to(tl.float32)
    second = tl.load(high, mask=mask).to(tl.float32)
    cos_low = tl.load(cos + cols, mask=used).to(tl.float32)[None, :]
    sin_low = tl.load(sin + cols, mask=used).to(tl.float32)[None, :]
    cos_high = tl.load(cos + HALF + cols, mask=used).to(tl.float32)[None, :]
    sin_high = tl.load(sin + HALF + cols, mask=used).to(tl.float32)[None, :]
    tl.store(low, (first * cos_low + second * sin_low).to(x.dtype.element_ty), mask=mask)
    tl.store(high, (second * cos_high + first * sin_high).to(x.dtype.element_ty), mask=mask)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, in place; `cos` and `sin` must have the same strides."""
    num_tokens, num_heads, head_dim = x.shape
    half = head_dim // 2
    block = power_of_two(half)
    heads = min(power_of_two(num_heads), max(1, 1024 // block))
    _rotate_kernel[(num_tokens, -(-num_heads // heads))](
        x,
        cos,
        sin,
        x.stride(0),
        x.stride(1),
        cos.stride(0),
        NUM_HEADS=num_heads,
        HALF=half,
        HEADS=heads,
        BLOCK=block,
    )
    return x


@triton.jit
def _silu_mul_kernel(gate_up, out, INNER: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < INNER
    gate = tl.load(gate_up + row * (2 * INNER) + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * INNER) + INNER + cols, mask=mask, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * INNER + cols, result.to(out.dtype.element_ty), mask=mask)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up`; `gate_up` must be contiguous."""
    rows, width = gate_up.shape
    inner = width // 2
    out = torch.empty((rows, inner), dtype=gate_up.dtype, device=gate_up.device)
    block = min(2048, power_of_two(inner))
    _silu_mul_kernel[(rows, -(-inner // block))](gate_up, out, INNER=inner, BLOCK=block)
    return out

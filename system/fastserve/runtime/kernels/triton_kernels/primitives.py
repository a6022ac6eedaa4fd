"""Functions that several kernels share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b):
    """`a @ b`, accumulated in float32 and not rounded to tf32."""
    if _INTERPRETED:  # The interpreter keeps bfloat16 numbers as integers, and would multiply these.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def token_offsets(table, tokens, mask, stride_block, stride_token, BLOCK_SIZE: tl.constexpr):
    """Offsets of a request's tokens in the cache, in elements: int64, since a cache has more than 2^31 elements."""
    place = tokens.to(tl.uint32)
    blocks = tl.load(table + place // BLOCK_SIZE, mask=mask, other=None if mask is None else 0)
    return blocks.to(tl.int32).to(tl.int64) * stride_block + (place % BLOCK_SIZE).to(tl.int32) * stride_token


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`: the length of a Triton tile for so many elements."""
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Chip:
    """Properties of a GPU that decide tiles and splits."""

    multiprocessors: int
    major: int
    """Major compute capability: 8 for Ampere, 9 for Hopper."""


@cache
def chip(device: torch.device) -> Chip:
    """The properties of a GPU; on a CPU those of a small GPU, so that the interpreter also splits long contexts."""
    if device.type != "cuda":
        return Chip(multiprocessors=4, major=9)
    properties = torch.cuda.get_device_properties(device)
    return Chip(multiprocessors=properties.multi_processor_count, major=properties.major)

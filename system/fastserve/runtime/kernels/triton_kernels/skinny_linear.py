"""A linear layer for few rows, whose time goes into reading the weight once.

Libraries choose tiles for arithmetic, and with 16 rows leave part of the memory's bandwidth unused. Here a program
computes `BLOCK_N` columns over a share of the inner dimension, so that enough programs keep all multiprocessors
loading. The last program to finish a tile adds up the shares.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastserve.runtime.kernels.triton_kernels.primitives import dot

ROW_TILES = (16, 32, 64)
"""Rows are padded to the next of these; the last is the most."""
DTYPES = (torch.float16, torch.bfloat16)


class Tiling(NamedTuple):
    """How to divide the work among programs."""

    block_n: int
    block_k: int
    num_splits: int
    """Shares of the inner dimension."""
    num_stages: int
    """Tiles of the weight loaded ahead."""
    num_warps: int = 4


class Workspace:
    """Partial results that the programs of a launch exchange; launches on one stream can share it."""

    def __init__(self, device: torch.device, max_columns: int, max_splits: int) -> None:
        self.partial = torch.empty(max_splits * ROW_TILES[-1] * max_columns, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(max_columns, dtype=torch.int32, device=device)
        """Number of finished shares of each tile; the last program resets it to 0."""


def tilings(num_columns: int, num_inner: int, num_processors: int) -> list[Tiling]:
    """Candidate tilings for a weight `[num_columns, num_inner]`: programs for about two, four and eight rounds of all
    multiprocessors, in two tile sizes. Empty if no tile size divides the inner dimension."""
    found = []
    for block_n, block_k, num_stages in ((64, 128, 3), (128, 64, 4)):
        if num_inner % block_k:
            continue
        tiles = -(-num_columns // block_n)
        most = num_inner // block_k
        for rounds in (2, 4, 8):
            splits = max(1, min(most, round(rounds * num_processors / tiles)))
            found.append(Tiling(block_n, block_k, splits, num_stages))
    return list(dict.fromkeys(found))


def row_tile(rows: int) -> int:
    """The number of rows to which `rows` are padded."""
    return next(tile for tile in ROW_TILES if rows <= tile)


def skinny_linear(
    x: Tensor, weight: Tensor, bias: Tensor, floor: float, tiling: Tiling, workspace: Workspace
) -> Tensor:
    """`max(x @ weight.T + bias, floor)`. (One kernel with and without ReLU, since compiling takes seconds.)

    Args:
        x: `[rows, num_inner]`, contiguous, at most `ROW_TILES[-1]` rows; float16 or bfloat16, as all tensors.
        weight: `[num_columns, num_inner]`, contiguous; `num_inner` is a multiple of the tiling's `block_k`.
        bias: `[num_columns]`.
        floor: 0 for a ReLU, minus infinity for none.
        tiling: one of `tilings`.
        workspace: for at least these columns and splits.

    Returns:
        `[rows, num_columns]`.
    """
    rows, num_inner = x.shape
    num_columns = weight.shape[0]
    out = torch.empty(rows, num_columns, dtype=x.dtype, device=x.device)
    _skinny_linear[(triton.cdiv(num_columns, tiling.block_n), tiling.num_splits)](
        x,
        weight,
        bias,
        out,
        workspace.partial,
        workspace.arrived,
        rows,
        num_columns,
        num_inner // tiling.block_k,
        num_inner,
        floor,
        SPLIT=tiling.num_splits > 1,
        BLOCK_M=row_tile(rows),
        BLOCK_N=tiling.block_n,
        BLOCK_K=tiling.block_k,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    return out


@triton.jit(do_not_specialize=["num_rows", "num_steps", "floor"])
def _skinny_linear(
    x,
    weight,
    bias,
    out,
    partial,
    arrived,
    num_rows,
    num_columns,
    num_steps,
    num_inner,
    floor,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, share = tl.program_id(0), tl.program_id(1)
    num_shares = tl.num_programs(1)
    row = tl.arange(0, BLOCK_M)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    in_rows, in_columns = row < num_rows, column < num_columns
    weight_at = weight + column[:, None].to(tl.int64) * num_inner + inner[None, :]
    x_at = x + row[None, :] * num_inner + inner[:, None]
    # Transposed, so that the many columns fill the matrix unit's long side.
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(share * num_steps // num_shares, (share + 1) * num_steps // num_shares):
        w_tile = tl.load(weight_at + step * BLOCK_K, mask=in_columns[:, None], other=0.0, eviction_policy="evict_first")
        x_tile = tl.load(x_at + step * BLOCK_K, mask=in_rows[None, :], other=0.0)
        sums += dot(w_tile, x_tile)
    at = row[None, :] * num_columns + column[:, None]
    inside = in_rows[None, :] & in_columns[:, None]
    is_last = True
    if SPLIT:
        size = num_rows * num_columns
        tl.store(partial + share * size + at, sums, mask=inside)
        tl.debug_barrier()  # All stores of the program come before its arrival.
        is_last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == num_shares - 1
        if is_last:
            sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for other in range(num_shares):  # Always in this order, for reproducible results.
                sums += tl.load(partial + other * size + at, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(arrived + tile, 0)
    if is_last:
        sums += tl.load(bias + column, mask=in_columns, other=0.0).to(tl.float32)[:, None]
        sums = tl.maximum(sums, floor)
        tl.store(out + at, sums.to(out.dtype.element_ty), mask=inside)

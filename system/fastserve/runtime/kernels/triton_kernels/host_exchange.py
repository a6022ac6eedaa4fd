"""Move a decode batch's inputs and tokens with kernels that access page-locked host memory: a copy of these few bytes
would queue behind swaps."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TOKENS_AT_ONCE = 256
_BLOCKS_AT_ONCE = 128


@triton.jit(
    do_not_specialize=["stride_packed", "stride_table"],
    do_not_specialize_on_alignment=[
        "packed", "token_ids", "positions", "slot_mapping", "context_lens", "block_tables",
    ],
)  # fmt: skip
def _load_kernel(
    packed,
    token_ids,
    positions,
    slot_mapping,
    context_lens,
    block_tables,
    stride_packed,
    stride_table,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    packed += row * stride_packed
    position = tl.load(packed + 1)
    used = (position // BLOCK_SIZE + 1).to(tl.int32)
    for first in tl.range(0, used, BLOCKS, num_stages=1):
        entries = first + tl.arange(0, BLOCKS)
        valid = entries < used
        blocks = tl.load(packed + 2 + entries, mask=valid, other=0)
        tl.store(block_tables + row * stride_table + entries, blocks, mask=valid)
    tl.store(token_ids + row, tl.load(packed))
    tl.store(positions + row, position)
    tl.store(context_lens + row, position + 1)
    last = tl.load(packed + 1 + used)
    tl.store(slot_mapping + row, last * BLOCK_SIZE + position % BLOCK_SIZE)


def load_decodes(
    packed: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    block_size: int,
) -> None:
    """Fill the inputs of a decode batch."""
    _load_kernel[(len(packed),)](
        packed,
        token_ids,
        positions,
        slot_mapping,
        context_lens,
        block_tables,
        packed.stride(0),
        block_tables.stride(0),
        BLOCK_SIZE=block_size,
        BLOCKS=_BLOCKS_AT_ONCE,
    )


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["source", "destination"])
def _exchange_kernel(source, destination, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = index < count
    tl.store(destination + index, tl.load(source + index, mask=valid), mask=valid)


def exchange(source: Tensor, destination: Tensor) -> None:
    """Copy integers between device and host."""
    count = len(source)
    _exchange_kernel[(-(-count // _TOKENS_AT_ONCE),)](source, destination, count, BLOCK=_TOKENS_AT_ONCE)

"""ForwardBatch: the flat batch that a model runs, all requests' tokens concatenated, decodes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fastserve.runtime.kernels import AttentionMetadata, kernels_for


class SequenceInput(NamedTuple):
    """The tokens that one request computes in one iteration."""

    token_ids: list[int]
    """The tokens to compute: a prompt, a chunk of it, or the last generated token."""
    start: int
    """Position of the first token: `num_computed_tokens` before this iteration."""
    block_table: list[int]
    """Blocks of the cache, in order, for at least `start + len(token_ids)` tokens."""


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """`num_tokens` query tokens of `num_requests` requests, as int64 tensors on the model's device."""

    token_ids: Tensor
    """`[num_tokens]`"""
    positions: Tensor
    """`[num_tokens]`: index of each token in its request, from 0."""
    slot_mapping: Tensor
    """`[num_tokens]`: slot of each token's keys and values, `block_id * block_size + offset`."""
    attention: AttentionMetadata
    order: list[int]
    """`order[row]` is the caller's index of the request in that row of the batch."""
    on_host: Tensor | None = None
    """Host memory that a GPU may still read the inputs from; freed with the batch."""

    @property
    def num_requests(self) -> int:
        """Requests in the batch; also the number of rows of the logits."""
        return len(self.order)

    def last_tokens(self) -> Tensor | None:
        """Index of each request's last query token, `[num_requests]`; None if these are all tokens."""
        if self.attention.num_decodes == self.num_requests:
            return None
        return self.attention.query_starts[1:] - 1

    def in_callers_order(self, rows: list[int]) -> list[int]:
        """Reorder one value per row to the caller's order."""
        values = [0] * len(rows)
        for row, index in enumerate(self.order):
            values[index] = rows[row]
        return values

    @classmethod
    def build(cls, sequences: Sequence[SequenceInput], block_size: int, device: torch.device | str) -> ForwardBatch:
        """Lay out `sequences` as a batch, and send it to the device in one piece.

        Raises:
            ValueError: there is no sequence, a sequence has no tokens, or its block table is too short for them.
        """
        if not sequences:
            raise ValueError("a batch needs at least one sequence")
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].token_ids) != 1)
        rows = [sequences[i] for i in order]
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        tables: list[int] = []
        width = max(len(row.block_table) for row in rows)
        query_lens = [len(row.token_ids) for row in rows]
        context_lens = [row.start + query_len for row, query_len in zip(rows, query_lens, strict=True)]
        for row, context_len in zip(rows, context_lens, strict=True):
            table = row.block_table
            if not row.token_ids or len(table) * block_size < context_len:
                raise ValueError(
                    f"sequence of {len(row.token_ids)} tokens from position {row.start} has {len(table)} blocks of "
                    f"{block_size}: it needs at least one token and {-(-context_len // block_size)} blocks"
                )
            span = range(row.start, context_len)
            token_ids += row.token_ids
            positions += span
            slots += [table[position // block_size] * block_size + position % block_size for position in span]
            tables += table
            tables += [0] * (width - len(table))
        query_starts = [0, *accumulate(query_lens)]
        parts = (token_ids, positions, slots, query_starts, context_lens, tables)
        device = torch.device(device)
        on_host = packed = torch.tensor([x for part in parts for x in part], pin_memory=device.type == "cuda")
        if device.type == "cuda":
            packed = torch.empty(on_host.shape, dtype=on_host.dtype, device=device)
            kernels_for(device).exchange(on_host, packed)
        ids, places, slot_mapping, starts, contexts, flat_tables = packed.split([len(part) for part in parts])
        block_tables = flat_tables.view(len(rows), width)
        attention = AttentionMetadata(
            num_decodes=sum(query_len == 1 for query_len in query_lens),
            max_query_len=max(query_lens),
            query_starts=starts,
            context_lens=contexts,
            block_tables=block_tables,
            host_query_lens=query_lens,
            host_context_lens=context_lens,
        )
        return cls(ids, places, slot_mapping, attention, order, on_host)

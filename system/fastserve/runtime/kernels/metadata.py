"""AttentionMetadata: the shape of a batch, for attention kernels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AttentionMetadata:
    """Queries of each request in the flat batch, and its context in the cache.

    Requests have the same order in all fields, decodes first. Tensors are int64, on the model's device.
    """

    num_decodes: int
    """Number of leading requests with exactly one query token."""
    max_query_len: int
    """Most query tokens of a request."""
    query_starts: Tensor
    """`[num_requests + 1]`: index of each request's first query token, and the total."""
    context_lens: Tensor
    """`[num_requests]`: tokens in the cache after this step, the queries included."""
    block_tables: Tensor
    """`[num_requests, max_blocks]`, padded with zeros, which kernels must not read."""
    host_query_lens: list[int]
    """Query tokens of each request, for kernels that loop on the host; may be empty for others, as the next field."""
    host_context_lens: list[int]
    """`context_lens`, on the host."""

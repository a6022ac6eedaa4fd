"""What attention kernels are told of a batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AttentionMetadata:
    """Where each request's queries lie in the flat batch and its context in the cache. Request `i` is the same in all
    fields, and decodes come first. Tensors are int64, on the model's device.
    """

    num_decodes: int
    """The first so many requests have exactly one query token."""
    max_query_len: int
    """Of any request."""
    query_starts: Tensor
    """`[num_requests + 1]`: the first query token of each request, and the total."""
    context_lens: Tensor
    """`[num_requests]`: tokens in the cache after this step, the queries' own included."""
    block_tables: Tensor
    """`[num_requests, max_blocks]`, padded with zeros, which no one may read."""
    host_query_lens: list[int]
    """Query tokens of each request. This and the next serve kernels that loop on the host, and are empty where none
    does."""
    host_context_lens: list[int]
    """`context_lens`, on the host."""

"""What a real executor's workers are given for an iteration, and how what they return becomes a result."""

from __future__ import annotations

from collections.abc import Sequence

from fastserve.kvcache import KVCacheManager
from fastserve.models import SequenceInput
from fastserve.request import SamplingParams
from fastserve.scheduler.iteration import Iteration


class Inputs:
    """Turns iterations into sequences and sampling parameters. Reads block tables from `kv` and changes nothing."""

    def __init__(self, kv: KVCacheManager) -> None:
        self.params: dict[str, SamplingParams] = {}
        """Of the requests in the system."""
        self._kv = kv

    def sequences(self, iteration: Iteration) -> list[SequenceInput]:
        """What is to be computed, in the iteration's order."""
        sequences = []
        for request, count in zip(iteration.requests, iteration.num_scheduled_tokens, strict=True):
            if count:  # Padding takes time and computes nothing; here it does not take time either.
                first = request.num_computed_tokens
                tokens = request.token_ids[first : first + count]
                sequences.append(SequenceInput(tokens, first, self._kv.block_table(request)))
        return sequences

    def sampling(self, iteration: Iteration) -> list[SamplingParams]:
        """How to draw the next token of each sequence."""
        return [
            self.params[request.request_id]
            for request, count in zip(iteration.requests, iteration.num_scheduled_tokens, strict=True)
            if count
        ]


def tokens_by_request(tokens: Sequence[int], num_scheduled_tokens: Sequence[int]) -> Sequence[int]:
    """A token for every request of an iteration, of those of its sequences: 0 where nothing was computed."""
    if len(tokens) == len(num_scheduled_tokens):
        return tokens
    computed = iter(tokens)
    return [next(computed) if count else 0 for count in num_scheduled_tokens]

"""Checks of a profile's numbers: units and times that are possible."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from fastserve.core.errors import ConfigError
from fastserve.latency.base import LatencyModel

_SHORTEST_S, _LONGEST_S = 1e-6, 10.0
"""What an iteration of one token can take on any machine. Outside, the unit is not seconds."""
_SLOWEST_BYTES_PER_S = 1e6
LARGEST_BATCH = 4096


def check_bandwidth(where: str, bytes_per_s: float) -> None:
    """Raise ConfigError for a bandwidth that can only be in another unit."""
    if bytes_per_s < _SLOWEST_BYTES_PER_S:
        raise ConfigError(f"{where} must be in bytes/s, got {bytes_per_s:g}, which no link is as slow as")


def check_times(where: str, stage: LatencyModel, batches: Iterable[int], capacity_tokens: int) -> None:
    """Raise ConfigError if an iteration that fits the cache would take no time or less, or one token implausibly long.

    `batches` are the numbers of decodes where the stage's times have corners; they are linear between. Prompts are
    sampled at powers of two.
    """
    for prompts, contexts in _shapes(batches, capacity_tokens):
        seconds = stage.iteration_time(prompts, contexts)
        if not 0 < seconds < math.inf:
            raise ConfigError(
                f"{where} gives {seconds:.4g} s for {_described(prompts, contexts)}; every time up to the "
                f"{capacity_tokens} tokens of the cache must be above 0"
            )
    for prompts, contexts in (([1], []), ([], [1])):
        seconds = stage.iteration_time(prompts, contexts)
        if not _SHORTEST_S <= seconds <= _LONGEST_S:
            raise ConfigError(
                f"{where} gives {seconds:.4g} s for {_described(prompts, contexts)}; a time is in seconds, this one "
                f"must be from {_SHORTEST_S:g} to {_LONGEST_S:g}"
            )


def _shapes(batches: Iterable[int], capacity_tokens: int) -> Iterator[tuple[list[int], list[int]]]:
    lengths = [2**power for power in range(capacity_tokens.bit_length())] + [capacity_tokens]
    for length in lengths:
        yield [length], []
        yield [1] * min(length, LARGEST_BATCH), []
    for batch in sorted({min(batch, capacity_tokens, LARGEST_BATCH) for batch in batches}):
        for context in (batch, capacity_tokens):
            contexts = [1] * (batch - 1) + [context - batch + 1]
            yield [], contexts
            yield [1], contexts
            yield [lengths[-1]], contexts


def _described(prompts: list[int], contexts: list[int]) -> str:
    parts = []
    if prompts:
        parts.append(f"{_count(len(prompts), 'prompt')} of {_count(sum(prompts), 'token')}")
    if contexts:
        parts.append(f"{_count(len(contexts), 'decode')} over {_count(sum(contexts), 'token')}")
    return " and ".join(parts)


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"

"""Time messages between ranks, by size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastserve.core.parallel import Place
from fastserve.runtime.parallel.groups import Ranks

_BUSY_S = 5e-3
"""Long enough for a message to be sent before it is received."""


def time_all_reduces(ranks: Ranks, sizes: Sequence[int], like: Tensor, repeats: int) -> list[float]:
    """Median seconds of an all-reduce among the shards of a stage, for each size. Every rank calls it.

    Args:
        ranks: how this rank reaches the others.
        sizes: bytes of one shard's message.
        like: a tensor with the messages' dtype and device.
        repeats: measurements of each size, after one to warm up.
    """
    medians = []
    for size in sizes:
        x = _message(size, like)

        def once(x: Tensor = x) -> None:
            ranks.group.all_reduce(x)

        medians.append(_median(once, repeats, like.device))
    return medians


def time_sends(place: Place, ranks: Ranks, sizes: Sequence[int], like: Tensor, repeats: int) -> list[float]:
    """Mean seconds in which a stage receives a message, for each size; empty on the first stage. Every rank calls it.

    The stage before has sent the message and computes meanwhile, as in a full pipeline: where stages share cores, the
    transport has to wait for one. Links between stages are timed one after the other, all shards of a stage at once.
    Arguments as for `time_all_reduces`.
    """
    means: list[float] = []
    for stage in range(max(0, place.stage - 1), min(place.stage + 1, place.num_stages - 1)):
        sends = place.stage == stage
        other = place.rank + (place.num_shards if sends else -place.num_shards)
        for size in sizes:
            x, ready = _message(size, like), _message(1, like)
            seconds = []
            for _ in range(1 + repeats):
                with ranks.progress.waiting(f"stage {other // place.num_shards}"):
                    if sends:
                        torch.distributed.recv(ready, other)
                        sent: Any = torch.distributed.isend(x, other)
                        _compute(3 * _BUSY_S)
                        sent.wait()
                    else:
                        torch.distributed.send(ready, other)
                        _compute(_BUSY_S)
                        start = time.perf_counter()
                        torch.distributed.recv(x, other)
                        _end(like.device)
                        seconds.append(time.perf_counter() - start)
            if not sends:
                means.append(statistics.mean(seconds[1:]))
    return means


def _compute(seconds: float) -> None:
    """Keep a core busy for so many seconds."""
    x, weight = torch.ones(16, 256), torch.ones(256, 256)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        x @ weight


def _message(size: int, like: Tensor) -> Tensor:
    return like.new_zeros(max(1, size // like.element_size()))


def _median(once: Callable[[], None], repeats: int, device: torch.device) -> float:
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        once()
        _end(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _end(device: torch.device) -> None:
    """Wait until a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Measure the link between the pools on the device and in host memory."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastserve.kvcache import Direction
from fastserve.latency import HostLink, fit_link
from fastserve.profiling.config import TIMED_BLOCKS
from fastserve.runtime.worker.copier import BlockCopier
from fastserve.runtime.worker.runner import Runner


def host_link(
    copy_time: Callable[[Direction, Sequence[int]], float], runner: Runner, bytes_per_token: int, repeats: int = 5
) -> tuple[HostLink, list[dict[str, Any]]]:
    """Measure the link between the runner's pools. Returns it and its points: bytes and seconds in each direction.

    The link is fitted to the mean of both directions, one at a time. Blocks are scattered, as those of a request are;
    each point is the median of `repeats`. Each of several ranks copies its part, and the bytes are those of all ranks.
    """
    pools = min(runner.num_gpu_blocks, runner.num_host_blocks)
    block_bytes = runner.block_size * bytes_per_token
    order = random.Random(0).sample(range(pools), min(pools, TIMED_BLOCKS))
    points: list[dict[str, Any]] = []
    for direction in Direction:
        for count in sorted({1, min(4, len(order)), min(16, len(order)), len(order)}):
            seconds = [copy_time(direction, order[:count]) for _ in range(1 + repeats)]
            points.append(
                {"direction": direction.value, "bytes": count * block_bytes, "seconds": float(np.median(seconds[1:]))}
            )
    latency_s, bandwidth = fit_link([(point["bytes"], point["seconds"]) for point in points])
    return HostLink(bandwidth, latency_s), points


def copy_time(copier: BlockCopier, direction: Direction, blocks: Sequence[int]) -> float:
    """Copy blocks between a worker's pools and return the seconds that takes."""
    began = time.perf_counter()
    copier.start(direction, blocks, blocks, None)
    while not copier.finished():
        copier.wait(float("inf"))
    return time.perf_counter() - began

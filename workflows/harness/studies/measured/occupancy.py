"""Requests in service and tokens of their caches over time."""

from __future__ import annotations

import numpy as np
import pandas as pd

COLUMNS = ("time_s", "batch", "cache_tokens")


def from_requests(requests: pd.DataFrame, times_s: np.ndarray) -> pd.DataFrame:
    """What the rows of requests tell: a real run leaves nothing else.

    A request counts from when it was first scheduled until it finished, with its prompt and the tokens it has made so
    far, spread evenly between the first and the last. Preemptions cannot be seen: a request whose cache was dropped
    counts all the same, so that the sum may exceed the cache.
    """
    start, first, last = (requests[name].to_numpy(float) for name in ("scheduled_s", "first_token_s", "finished_s"))
    prompt, output = (requests[name].to_numpy(float) for name in ("prompt_tokens", "output_tokens"))
    at = times_s[:, None]
    in_service = (start <= at) & (at < last)
    made = np.clip((at - first) / np.maximum(last - first, 1e-9), 0.0, 1.0) * output
    cache = (in_service * (prompt + made)).sum(axis=1)
    return pd.DataFrame({"time_s": times_s, "batch": in_service.sum(axis=1), "cache_tokens": cache})


def from_iterations(
    iterations: pd.DataFrame, times_s: np.ndarray, capacity_blocks: int, block_size: int
) -> pd.DataFrame:
    """What the simulator did: the requests of the iteration under way, and the blocks in use as tokens.

    Between two iterations, and after the last, the batch is 0.
    """
    index = np.searchsorted(iterations["start_s"].to_numpy(float), times_s, side="right") - 1
    known = np.maximum(index, 0)
    is_running = (index >= 0) & (times_s < iterations["end_s"].to_numpy(float)[known])
    used = capacity_blocks - iterations["free_gpu_blocks"].to_numpy(float)[known]
    return pd.DataFrame(
        {
            "time_s": times_s,
            "batch": np.where(is_running, iterations["num_requests"].to_numpy(int)[known], 0),
            "cache_tokens": np.where(is_running, used * block_size, 0.0),
        }
    )

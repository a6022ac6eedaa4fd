"""Ranks of a model on this machine, for a test to share between engines."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastserve.runtime.executors.ranks import RankGroup
from fastserve.runtime.worker.protocol import RankConfig


def rank_config(model: str | Path, tensor: int, pipeline: int, **changes: Any) -> RankConfig:
    shape = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
    return RankConfig(str(model), **{"max_batch_size": 4, "torch_threads": 1} | shape | changes)


@contextmanager
def rank_group(
    model: str | Path, tensor: int, pipeline: int, *, num_gpu_blocks: int, num_host_blocks: int, **changes: Any
) -> Iterator[RankGroup]:
    config = rank_config(model, tensor, pipeline, **changes)
    group = RankGroup(config, num_gpu_blocks=num_gpu_blocks, num_host_blocks=num_host_blocks)
    try:
        yield group
    finally:
        group.close()

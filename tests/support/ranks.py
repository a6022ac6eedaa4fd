"""Ranks of a model on this machine, for a test to share between engines."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastserve.executor.ranks import RankGroup
from fastserve.worker.protocol import RankConfig

BLOCK_SIZE = 16


def rank_config(model: str | Path, tensor: int, pipeline: int, **changes: Any) -> RankConfig:
    fields: dict[str, Any] = {
        "model": str(model),
        "load_format": "auto",
        "device": "cpu",
        "dtype": "float32",
        "seed": 0,
        "block_size": BLOCK_SIZE,
        "max_batch_size": 4,
        "token_budget": 2048,
        "max_model_len": None,
        "tensor_parallel_size": tensor,
        "pipeline_parallel_size": pipeline,
        "stage_layers": None,
        "ranks_on_host": tensor * pipeline,
        "torch_threads": 1,
        "timeout_s": 8.0,
    }
    return RankConfig(**fields | changes)


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

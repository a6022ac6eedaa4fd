"""Ranks of a model on this machine, for a test to share between engines."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastserve.core.config import EngineOptions, ModelSource
from fastserve.core.options import option_names
from fastserve.core.parallel import ParallelConfig
from fastserve.runtime.executors.ranks import RankGroup
from fastserve.runtime.worker.protocol import RankConfig


def rank_config(model: str | Path, tensor: int, pipeline: int, **changes: Any) -> RankConfig:
    """`changes` are of fields of the config or of what it is made of."""
    parts: list[Any] = []
    sizes = {"model": str(model), "tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
    given = sizes | {"max_batch_size": 4, "torch_threads": 1} | changes
    for part in (ModelSource, ParallelConfig, EngineOptions):
        parts.append(part(**{name: given.pop(name) for name in option_names(part) if name in given}))
    return RankConfig(*parts, **given)


@contextmanager
def rank_group(model: str | Path, tensor: int, pipeline: int, **changes: Any) -> Iterator[RankGroup]:
    group = RankGroup(rank_config(model, tensor, pipeline, **changes))
    try:
        yield group
    finally:
        group.close()

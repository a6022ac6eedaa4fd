"""Memory of a rank's part of a model, and default sizes of the cache pools beside it."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastserve.core.config import EngineOptions, ModelConfig, dtype_bytes
from fastserve.core.parallel import Place
from fastserve.runtime.models import Part, empty_model
from fastserve.runtime.parallel.groups import ALONE
from fastserve.runtime.worker.memory import available_bytes

_CPU_CACHE_SHARE, _GPU_CACHE_SHARE, _PINNED_SHARE = 1 / 16, 0.85, 0.5
"""Default size of a pool, as a share of the memory that the weights leave free. On a CPU both pools share memory with
other programs, so that together they take an eighth. The last is the host pool's share of host memory beside a GPU."""
MOST_CPU_CACHE_SHARE = 0.2
"""Share of a pool on a CPU if one full context needs more."""


def rank_bytes(model: ModelConfig, place: Place, dtype: str) -> int:
    """Bytes of the weights at `place`."""
    dtype_bytes(dtype)  # Raises for an unsupported type.
    # All layers are alike: count one, on a device that stores nothing.
    part = Part(model, replace(place, num_layers=1), ALONE, getattr(torch, dtype), torch.device("meta"))
    counted = {
        weight.name: weight.target.nbytes * (place.num_layers if ".layers." in weight.name else 1)
        for weight in empty_model(part).weights()
    }
    return sum(counted.values())


def default_num_blocks(
    model: ModelConfig,
    options: EngineOptions,
    device: str,
    dtype: str,
    place: Place | None = None,
    sharers: int = 1,
    cpu_share: float = _CPU_CACHE_SHARE,
) -> int:
    """Blocks for a full batch of full contexts, but at most a share of the memory that the weights leave free.

    Args:
        model: the architecture.
        options: batch size, block size and context.
        device: where the pool is.
        dtype: of weights and cache.
        place: the part of the model that the blocks belong to; None: the whole.
        sharers: ranks that share the host's memory; a GPU has one rank.
        cpu_share: share of the memory on a CPU, where one full context may take more.
    """
    place = place or Place.whole(model)
    context = min(model.max_model_len, options.max_model_len or model.max_model_len)
    one_context = -(-context // options.block_size)
    block_bytes = options.block_size * place.kv_bytes_per_token(model, dtype)
    spare_bytes = available_bytes(torch.device(device))
    if device.startswith("cuda"):
        blocks = int(_GPU_CACHE_SHARE * (spare_bytes - rank_bytes(model, place, dtype)) / block_bytes)
    else:
        spare_bytes = spare_bytes // sharers - rank_bytes(model, place, dtype)
        most = int(MOST_CPU_CACHE_SHARE * spare_bytes / block_bytes)
        blocks = max(int(cpu_share * spare_bytes / block_bytes), min(one_context, most))
    return max(1, min(options.max_batch_size * one_context, blocks))


def default_num_host_blocks(
    model: ModelConfig,
    num_gpu_blocks: int,
    block_size: int,
    device: str,
    dtype: str,
    place: Place | None = None,
    sharers: int = 1,
) -> int:
    """As many blocks as on the device; beside a GPU at most a share of host memory, since they are page-locked.

    `place` and `sharers` as for `default_num_blocks`.
    """
    if not device.startswith("cuda"):
        return num_gpu_blocks
    place = place or Place.whole(model)
    room = _PINNED_SHARE * available_bytes(torch.device("cpu")) / sharers
    return min(num_gpu_blocks, int(room / (block_size * place.kv_bytes_per_token(model, dtype))))

"""How much memory a rank's part of a model takes, and how large pools can be beside it."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastserve.core.config import EngineOptions, ModelConfig, dtype_bytes
from fastserve.core.parallel import Place
from fastserve.runtime.models import Part, empty_model
from fastserve.runtime.parallel.groups import ALONE
from fastserve.runtime.worker.memory import available_bytes

_CPU_CACHE_SHARE, _GPU_CACHE_SHARE, _PINNED_SHARE = 1 / 16, 0.85, 0.5
"""Share of the memory that the weights leave which a pool takes where its size is not given; the last is of the host's
memory, beside a GPU. On a CPU both pools are in the same memory, which others use too: an eighth for the two."""
MOST_CPU_CACHE_SHARE = 0.2
"""What a pool on a CPU takes instead if one full context needs it."""


def rank_bytes(model: ModelConfig, place: Place, dtype: str) -> int:
    """Bytes of the weights of that part of the model."""
    dtype_bytes(dtype)  # A type we run?
    # Layers are alike: of one of them, on a device that stores nothing, all can be counted.
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
    """Blocks for a full batch of full contexts, or what a share of the memory allows that the weights leave.

    Blocks of the part of the model at `place`, of which `sharers` ranks share the host's memory; a GPU has one rank.
    On a CPU the share is `cpu_share`, and more if one full context needs it.
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
    """As many blocks as on the device; beside a GPU no more than a share of the host's memory, being page-locked.

    `place` and `sharers` as for `default_num_blocks`.
    """
    if not device.startswith("cuda"):
        return num_gpu_blocks
    place = place or Place.whole(model)
    room = _PINNED_SHARE * available_bytes(torch.device("cpu")) / sharers
    return min(num_gpu_blocks, int(room / (block_size * place.kv_bytes_per_token(model, dtype))))

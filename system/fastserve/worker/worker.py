"""One rank: a model, a KV pool on its device and one in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastserve.config import ModelConfig, dtype_bytes, require_int
from fastserve.errors import ConfigError
from fastserve.models import ForwardBatch, SequenceInput, build_model
from fastserve.worker.memory import require_room
from fastserve.worker.sampler import SamplingLike, sample


class Worker:
    """Runs iterations and moves blocks. `copy_out` and `copy_in` may run in other threads during `execute`, on blocks
    it does not touch.

    Args:
        model_config: the architecture.
        num_gpu_blocks: blocks of the pool on `device` (with "cpu": a pool of its own in host memory).
        num_host_blocks: blocks of the host pool; may be 0.
        block_size: tokens per block.
        device: "cpu", "cuda" or "cuda:N".
        dtype: "float32", "bfloat16" or "float16", of weights and cache.
        seed: of the dummy weights, where `model_dir` is None.
        model_dir: directory in Hugging Face format with the weights.

    Raises:
        ConfigError: an option out of range, or weights or pools that do not fit the memory available.
        CheckpointError: `model_dir` is incomplete or does not match `model_config`.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        *,
        num_gpu_blocks: int,
        num_host_blocks: int,
        block_size: int,
        device: str = "cpu",
        dtype: str = "float32",
        seed: int = 0,
        model_dir: str | Path | None = None,
    ) -> None:
        for name, value, least in (
            ("num_gpu_blocks", num_gpu_blocks, 1),
            ("num_host_blocks", num_host_blocks, 0),
            ("block_size", block_size, 1),
        ):
            require_int(name, value, least)
        self.device = _device(device)
        self.block_size = block_size
        self._check_room(model_config, num_gpu_blocks, num_host_blocks, dtype)
        torch_dtype: torch.dtype = getattr(torch, dtype)
        self.model = build_model(model_config, torch_dtype, self.device, seed if model_dir is None else model_dir)
        layout = (model_config.num_layers, 2, block_size, model_config.num_kv_heads, model_config.head_dim)
        self.gpu_cache = torch.zeros(num_gpu_blocks, *layout, dtype=torch_dtype, device=self.device)
        # Page-locked, or a copy to or from the GPU would neither reach link speed nor run beside the compute.
        pinned = self.device.type == "cuda" and num_host_blocks > 0
        self.host_cache = torch.zeros(num_host_blocks, *layout, dtype=torch_dtype, pin_memory=pinned)

    def _check_room(self, model: ModelConfig, num_gpu_blocks: int, num_host_blocks: int, dtype: str) -> None:
        block_bytes = self.block_size * model.kv_bytes_per_token(dtype)
        device_bytes = model.num_parameters() * dtype_bytes(dtype) + num_gpu_blocks * block_bytes
        host_bytes = num_host_blocks * block_bytes
        per_block = f"of {block_bytes / 2**20:.2f} MiB"
        device_part = f"model {model.name} in {dtype} with {num_gpu_blocks} GPU blocks {per_block}"
        host_part = f"{num_host_blocks} host blocks {per_block}"
        if self.device.type == "cpu":
            require_room(f"{device_part} and {host_part}", device_bytes + host_bytes, self.device)
        else:
            require_room(device_part, device_bytes, self.device)
            require_room(host_part, host_bytes, torch.device("cpu"))

    @torch.inference_mode()
    def execute(self, sequences: Sequence[SequenceInput], sampling: Sequence[SamplingLike]) -> list[int]:
        """Compute the tokens of `sequences`, storing their keys and values, and sample each request's next token.

        The results are in the order of `sequences`. That of a chunk which is not a prompt's last is of no use. When
        this returns, the blocks are written and may be copied.
        """
        batch = ForwardBatch.build(sequences, self.block_size, self.device)
        logits = self.model(batch, self.gpu_cache)
        tokens = sample(logits, [sampling[i] for i in batch.order], batch.attention.context_lens)
        return batch.in_callers_order(tokens.tolist())

    def copy_out(self, gpu_blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        """Copy whole blocks from the device's pool to the host's, pair by pair; returns when they have arrived."""
        self._copy(self.gpu_cache, gpu_blocks, self.host_cache, host_blocks)

    def copy_in(self, host_blocks: Sequence[int], gpu_blocks: Sequence[int]) -> None:
        """Copy whole blocks from the host's pool to the device's, pair by pair; returns when they have arrived."""
        self._copy(self.host_cache, host_blocks, self.gpu_cache, gpu_blocks)

    def _copy(self, source: Tensor, source_blocks: Sequence[int], target: Tensor, target_blocks: Sequence[int]) -> None:
        pairs = zip(source_blocks, target_blocks, strict=True)
        if self.device.type == "cpu":
            for origin, destination in pairs:
                target[destination].copy_(source[origin])
            return
        # A stream per call: threads that copy in opposite directions use both directions of the link.
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            for origin, destination in pairs:
                target[destination].copy_(source[origin], non_blocking=True)
        stream.synchronize()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device {name!r}; known: cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; supported: cpu, cuda, cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} asked for, but torch finds no CUDA device; use cpu")
    return device

"""Find devices by name, copy small tensors to them, and set torch's threads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastserve.core.errors import ConfigError


def require_device(name: str, count: int = 1) -> torch.device:
    """The device with that name. ConfigError if it does not exist, or if `count` ranks find fewer GPUs."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device {name!r}; known: cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; supported: cpu, cuda, cuda:N")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} asked for, but torch finds no CUDA device; use cpu")
    found = torch.cuda.device_count()
    if device.index is not None and device.index >= found:
        raise ConfigError(f"device {name!r} asked for, but there are {found}: cuda:0 to cuda:{found - 1}")
    if count > 1 and device.index is not None:
        raise ConfigError(f"device {name!r} is one GPU, and {count} ranks need one each; use cuda")
    if count > found:
        raise ConfigError(f"{count} ranks on {name!r} need a GPU each, but there are {found}; use fewer ranks, or cpu")
    return device


def find_device(name: str) -> torch.device:
    """The device with that name, its index included; makes a GPU current. ConfigError if it does not exist."""
    device = require_device(name)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)  # Triton launches on the current device, not on that of its arguments.
    return device


def set_threads(count: int | None) -> None:
    """Compute with `count` threads in the calling thread, since torch keeps a number for each; None changes nothing."""
    if count is not None:
        torch.set_num_threads(count)


def num_threads() -> int:
    """Threads that torch computes with in the calling thread."""
    return torch.get_num_threads()


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device without waiting, from page-locked memory."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def tokens_on(values: Sequence[int], device: torch.device) -> Tensor:
    """An int64 tensor `[len(values)]` on the device."""
    return on_device(torch.tensor(values, dtype=torch.int64), device)

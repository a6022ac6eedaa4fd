"""Devices by name."""

from __future__ import annotations

import torch

from fastserve.errors import ConfigError


def require_device(name: str, count: int = 1) -> torch.device:
    """The device called so. Raises ConfigError if there is none, or fewer than `count` GPUs for as many ranks."""
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
    """The device called so, with its number; ConfigError if there is none. Makes a GPU the current one."""
    device = require_device(name)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)  # Triton launches on the current device, wherever its arguments are.
    return device

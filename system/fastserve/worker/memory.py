"""Is there room? Asked before a large allocation, whose failure would kill the process or say little."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fastserve.errors import ConfigError


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`, on a CPU with what the kernel could free without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:  # a container's limit (cgroup v2); "max" is none
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
        available = min(available, int(limit) - int(used))
    except (OSError, ValueError):
        pass
    return available


def require_room(what: str, size: int, device: torch.device) -> None:
    """Raise ConfigError unless `size` bytes fit on `device`."""
    available = available_bytes(device)
    if size > available:
        raise ConfigError(
            f"{what} needs {size / 2**30:.2f} GiB, but {device} has {available / 2**30:.2f} GiB available; "
            "lower num_gpu_blocks or num_host_blocks, or choose a smaller model or dtype"
        )

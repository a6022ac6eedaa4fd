"""Large allocations: check that they fit before the system kills the process, and page-lock memory."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastserve.core.errors import ConfigError

_PORTABLE = 1
"""cudaHostRegisterPortable: locked for every CUDA context."""


def available_bytes(device: torch.device | str) -> int:
    """Bytes that can still be allocated on `device`; on a CPU they include what the kernel can free."""
    device = torch.device(device)
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
            "lower num_gpu_blocks or num_host_blocks (or swap_space_gib_per_gpu), or choose a smaller model or dtype"
        )


class _Pages(mmap.mmap):
    """Whole pages of memory, since locking works on pages; unlocked when the last tensor in them is freed."""

    unlock: Callable[[], object] | None = None

    def __del__(self) -> None:
        if self.unlock is not None:
            self.unlock()


def pinned_zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros in page-locked host memory of exactly that size, locked until the tensor is freed.

    (With `pin_memory=True` torch rounds the size up to a power of two: 40 GB would take 64 GiB.) Tens of gigabytes take
    some seconds. Needs CUDA; raises ConfigError if the memory cannot be locked.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(*shape, dtype=dtype)
    memory = _Pages(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)  # After a fork, pages could move while the device uses their addresses.
    # Writing makes the pages resident with all of torch's threads; locking would use a single thread.
    tensor = torch.frombuffer(memory, dtype=dtype).view(shape).zero_()
    runtime = torch.cuda.cudart()
    error = runtime.cudaHostRegister(tensor.data_ptr(), size, _PORTABLE)
    if error != runtime.cudaError.success:
        raise ConfigError(
            f"cannot page-lock {size / 2**30:.2f} GiB of host memory for swapped caches "
            f"({runtime.cudaGetErrorString(error)}); lower num_host_blocks or "
            "swap_space_gib_per_gpu"
        )
    memory.unlock = partial(runtime.cudaHostUnregister, tensor.data_ptr())
    return tensor

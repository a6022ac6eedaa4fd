"""What ranks exchange while they compute: sums over the shards of a stage, activations from stage to stage."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor

from fastserve.core.parallel import Place

DEVICE = "its device"
"""What a rank on a GPU waits for, even if the device in turn waits for other ranks."""


class Progress:
    """How far a rank has come, read by another thread: tells a rank that hangs from one that waits for another rank.

    On a GPU the host only queues exchanges, and those in a CUDA graph count once, at its capture. So a rank on a GPU
    always waits for its device.
    """

    def __init__(self) -> None:
        self.count = 0
        self.waiting_for = ""

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Within, the rank waits for `what`, such as "stage 0". After an error `waiting_for` keeps it, as the cause."""
        self.waiting_for = what
        self.count += 1
        yield
        self.waiting_for = ""
        self.count += 1


class Group(Protocol):
    """The shards of one stage. All shards make the same calls in the same order."""

    index: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every shard's `x`; may be `x` itself, overwritten."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Every shard's `x`, of one shape: `[size, *x.shape]`."""


class Neighbours(Protocol):
    """The same shard of the stages before and after. A stage receives in the order in which the one before sends."""

    connected: bool
    """If False, `send` does nothing and `receive` returns random numbers: each stage computes by itself."""

    def receive(self, into: Tensor) -> None:
        """Wait for what the stage before sends, into `[rows, hidden_size]`. Not on the first stage."""

    def send(self, x: Tensor) -> None:
        """Send `[rows, hidden_size]` to the stage after, without waiting for it. Do not write to `x` afterwards: it is
        kept until the stage after has received it. Not on the last stage."""


class _Alone:
    """The group of a stage with a single shard."""

    index = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0)


ALONE: Group = _Alone()


@dataclass(frozen=True)
class Ranks:
    """How a rank reaches the others."""

    group: Group = ALONE
    neighbours: Neighbours | None = None
    """None where there is a single stage."""
    progress: Progress = field(default_factory=Progress)

    @contextmanager
    def disconnected(self) -> Iterator[None]:
        """Within, no activations are sent from stage to stage: each stage computes by itself."""
        if self.neighbours is None:
            yield
            return
        self.neighbours.connected = False
        try:
            yield
        finally:
            self.neighbours.connected = True


class _Shards:
    """A stage's shards over torch.distributed."""

    def __init__(self, place: Place, process_group: Any, progress: Progress) -> None:
        self.index = place.shard
        self.size = place.num_shards
        self._process_group = process_group
        self._progress = progress
        self._others = f"the other shards of stage {place.stage}"

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        with self._progress.waiting(self._others):
            torch.distributed.all_reduce(x, group=self._process_group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = x.new_empty(self.size, *x.shape)
        with self._progress.waiting(self._others):
            torch.distributed.all_gather(list(gathered.unbind(0)), x.contiguous(), group=self._process_group)
        return gathered


class _Stages:
    """The stages before and after over torch.distributed. With NCCL the current stream waits, not the host.

    As many sends may be pending as there are stages, and so iterations in flight; the next one waits for the first.
    (gloo notices that a send has ended only by waiting for it.)
    """

    def __init__(self, place: Place, progress: Progress) -> None:
        self.connected = True
        self._place = place
        self._progress = progress
        self._sent: deque[tuple[Any, Tensor]] = deque()
        self._random: Tensor | None = None

    def receive(self, into: Tensor) -> None:
        if not self.connected:
            if self._random is None or len(self._random) < len(into):
                self._random = torch.randn_like(into)
            into.copy_(self._random[: len(into)])
            return
        with self._progress.waiting(f"stage {self._place.stage - 1}"):
            torch.distributed.recv(into, self._place.rank - self._place.num_shards)

    def send(self, x: Tensor) -> None:
        if not self.connected:
            return
        if len(self._sent) == self._place.num_stages:
            work, _ = self._sent[0]
            with self._progress.waiting(f"stage {self._place.stage + 1}"):
                work.wait()
            self._sent.popleft()
        x = x.contiguous()
        self._sent.append((torch.distributed.isend(x, self._place.rank + self._place.num_shards), x))


def join(
    place: Place,
    world_size: int,
    device: torch.device,
    store: torch.distributed.Store | None,
    timeout_s: float,
) -> Ranks:
    """Join the process group, and wait for all ranks: gloo between CPUs, NCCL between GPUs.

    Args:
        place: of this rank.
        world_size: number of ranks.
        device: where this rank computes.
        store: of the process group; None: torchrun's, at MASTER_ADDR and MASTER_PORT.
        timeout_s: most time to wait for other ranks, here and in every exchange.

    Raises:
        ValueError: `place` belongs to a group of another size.
        RuntimeError: the other ranks did not join in time.
    """
    if world_size != place.num_stages * place.num_shards:
        raise ValueError(f"{place} is not one of {world_size} ranks")
    progress = Progress()
    if world_size == 1:
        return Ranks(progress=progress)
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with progress.waiting("all ranks"):
        torch.distributed.init_process_group(
            # Without a device_id, NCCL opens a connection for each pair of neighbours, on a stream of its own, so that
            # a stage can receive before what it sent has been taken.
            "nccl" if device.type == "cuda" else "gloo",
            init_method="env://" if store is None else None,
            store=store,
            rank=place.rank,
            world_size=world_size,
            timeout=timeout,
        )
        group = ALONE
        if place.num_shards > 1:
            first = place.stage * place.num_shards
            shards = torch.distributed.new_group(
                list(range(first, first + place.num_shards)), timeout=timeout, use_local_synchronization=True
            )
            group = _Shards(place, shards, progress)
    return Ranks(group, _Stages(place, progress) if place.num_stages > 1 else None, progress)


def leave() -> None:
    """Leave the process group; does nothing without one.

    Call it after all that was sent has been received, or gloo loses it, and after CUDA graphs with exchanges are freed,
    or NCCL waits for them.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

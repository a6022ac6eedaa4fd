"""What ranks tell one another while they compute: sums over the shards of a stage, activations from stage to stage."""

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
"""What a rank on a GPU waits for, also where that waits for other ranks."""


class Progress:
    """How far a rank has come, for another thread: one that hangs looks different from one that waits for it.

    On a GPU what follows only queues exchanges, and those in a CUDA graph count once, when it is captured: there a rank
    waits, in the end, for its device.
    """

    def __init__(self) -> None:
        self.count = 0
        self.waiting_for = ""

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Within, the rank waits for `what`, as "stage 0"; after an error it is still said to, which then was why."""
        self.waiting_for = what
        self.count += 1
        yield
        self.waiting_for = ""
        self.count += 1


class Group(Protocol):
    """The shards of one stage. All of them make the same calls in the same order."""

    index: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every shard's `x`; may be `x` itself, overwritten."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Every shard's `x`, of one shape: `[size, *x.shape]`."""


class Neighbours(Protocol):
    """The stages before and after, of the same shard. What one sends, the next receives in the same order."""

    connected: bool
    """Set to False, nothing is sent, and made-up numbers are received at once: each stage then computes by itself."""

    def receive(self, into: Tensor) -> None:
        """Fill `[rows, hidden_size]` with what the stage before has sent, and wait for that. Needs a stage before."""

    def send(self, x: Tensor) -> None:
        """Send `[rows, hidden_size]` to the stage after, without waiting until it is taken. `x` is kept until then,
        and must not be written to. Needs a stage after."""


class _Alone:
    """A stage of a single shard."""

    index = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0)


ALONE: Group = _Alone()


@dataclass(frozen=True)
class Ranks:
    """What a rank needs of the others."""

    group: Group = ALONE
    neighbours: Neighbours | None = None
    """None where there is a single stage."""
    progress: Progress = field(default_factory=Progress)


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
    """The stages before and after over torch.distributed. With NCCL it is the current stream that waits, not the host.

    As many sends may be on their way as there are stages, which is as many iterations as may be in flight; one more
    waits for the first. (gloo notices that a send has ended only by waiting for it.)
    """

    def __init__(self, place: Place, progress: Progress) -> None:
        self.connected = True
        self._place = place
        self._progress = progress
        self._sent: deque[tuple[Any, Tensor]] = deque()
        self._made_up: Tensor | None = None

    def receive(self, into: Tensor) -> None:
        if not self.connected:
            if self._made_up is None or len(self._made_up) < len(into):
                self._made_up = torch.randn_like(into)
            into.copy_(self._made_up[: len(into)])
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
    """Meet the other ranks, and wait until all are there; gloo carries data between CPUs, NCCL between GPUs.

    Args:
        place: of this rank.
        world_size: ranks in all.
        device: where this rank computes.
        store: where they meet; None: as torchrun says in the environment (MASTER_ADDR and MASTER_PORT).
        timeout_s: how long to wait for others, here and in every exchange, before a RuntimeError.
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
    """Part from the other ranks; does nothing where none were met.

    To be called when what was sent has been received, since gloo loses it otherwise, and when no CUDA graph is left
    with exchanges in it, since NCCL waits for those to go.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

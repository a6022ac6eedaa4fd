"""KVCacheManager: where every request's cache is, and which blocks hold it.

`Request.cache_state` and `Request.cache_capacity` are set here and nowhere else.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from fastserve.core.config import CacheConfig
from fastserve.core.request import NO_CACHE, RESIDENT, SWAPPED_OUT, Request, RequestStatus
from fastserve.kvcache.block_pool import BlockPool
from fastserve.kvcache.errors import CacheError, OutOfBlocksError, WrongLocationError


class Location(enum.Enum):
    """Where a request's cache is."""

    NONE = "none"
    GPU = "gpu"
    HOST = "host"
    SWAPPING_OUT = "swapping_out"
    SWAPPING_IN = "swapping_in"


class Direction(enum.Enum):
    """Direction of a transfer, as seen from the GPU."""

    OUT = "out"
    IN = "in"


class Transfer(NamedTuple):
    """One request's cache in transfer between the pools: block source[i] is copied to block destination[i]."""

    request: Request
    direction: Direction
    source: tuple[int, ...]
    destination: tuple[int, ...]
    num_bytes: int


@dataclass(slots=True)
class _Entry:
    """One request's share of the cache."""

    request: Request
    location: Location
    gpu_blocks: list[int]
    host_blocks: list[int]


class KVCacheManager:
    """Owns the GPU and the host block pool and every request's block table.

    Blocks under a transfer belong to the request on both sides until `complete` is called. So no block is given away
    before its copy has ended, and an executor needs no dependencies between blocks.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.block_size = config.block_size
        self._gpu = BlockPool("GPU", config.num_gpu_blocks)
        self._host = BlockPool("host", config.num_host_blocks)
        self._entries: dict[str, _Entry] = {}
        self.num_vacating_blocks = 0
        """GPU blocks that become free when the swap-outs under way end."""
        self.num_arriving_blocks = 0
        """GPU blocks that swap-ins under way are filling."""
        self.num_transfers = 0
        """Transfers under way."""

    # -- questions ---------------------------------------------------------------------------------------------

    @property
    def num_free_gpu_blocks(self) -> int:
        """Blocks of the GPU pool that can be given out now."""
        return self._gpu.num_free

    @property
    def num_free_host_blocks(self) -> int:
        """Blocks of the host pool that can be given out now."""
        return self._host.num_free

    def location(self, request: Request) -> Location:
        """Where the request's cache is."""
        entry = self._entries.get(request.request_id)
        return Location.NONE if entry is None else entry.location

    def block_table(self, request: Request) -> list[int]:
        """GPU blocks of a resident request, in token order. Not a copy: do not change it."""
        return self._resident(request).gpu_blocks

    def num_blocks(self, request: Request) -> int:
        """Blocks the request holds where its cache is now (on the GPU during a transfer)."""
        entry = self._entries.get(request.request_id)
        return 0 if entry is None else len(entry.gpu_blocks) or len(entry.host_blocks)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def blocks_to_hold(self, request: Request, num_tokens: int) -> int:
        """GPU blocks to find before the request, wherever its cache is, can hold `num_tokens` tokens on the GPU."""
        entry = self._entries.get(request.request_id)
        held = 0 if entry is None else len(entry.gpu_blocks)
        return max(0, self.blocks_for(num_tokens) - held)

    def resident_requests(self) -> list[Request]:
        """Requests whose cache is wholly on the GPU and not in transfer."""
        return [entry.request for entry in self._entries.values() if entry.location is Location.GPU]

    # -- changes -----------------------------------------------------------------------------------------------

    def extend(self, request: Request, num_tokens: int) -> None:
        """Give the request, new or resident, room on the GPU for `num_tokens` tokens in all."""
        entry = self._entries.get(request.request_id)
        if entry is None:
            blocks = self._gpu.allocate(self.blocks_for(num_tokens))
            self._entries[request.request_id] = _Entry(request, Location.GPU, blocks, [])
            request.cache_state = RESIDENT
            request.cache_capacity = len(blocks) * self.block_size
            return
        if request.cache_state != RESIDENT:
            raise WrongLocationError(f"request {request.request_id} cannot grow: its cache is {entry.location.value}")
        if num_tokens > request.cache_capacity:
            entry.gpu_blocks += self._gpu.allocate(self.blocks_for(num_tokens) - len(entry.gpu_blocks))
            request.cache_capacity = len(entry.gpu_blocks) * self.block_size

    def begin_swap_out(self, request: Request) -> Transfer:
        """Start moving a resident request's computed cache to host memory; its GPU blocks are freed by `complete`.

        Raises OutOfBlocksError, and changes nothing, when the host pool is full.
        """
        entry = self._resident(request)
        # Blocks allocated ahead of computation hold nothing and need no copy.
        used = self.blocks_for(request.num_computed_tokens)
        entry.host_blocks = self._host.allocate(used)
        entry.location = Location.SWAPPING_OUT
        request.cache_state = SWAPPED_OUT
        request.cache_capacity = 0
        self.num_vacating_blocks += len(entry.gpu_blocks)
        return self._transfer(request, Direction.OUT, entry.gpu_blocks[:used], entry.host_blocks)

    def begin_swap_in(self, request: Request) -> Transfer:
        """Start moving a request's cache back to the GPU, with room for the tokens it has to compute next.

        Its host blocks are freed by `complete`. Raises OutOfBlocksError, and changes nothing, when the GPU pool is
        short.
        """
        entry = self._entries.get(request.request_id)
        if entry is None or entry.location is not Location.HOST:
            raise WrongLocationError(
                f"request {request.request_id} cannot be swapped in: its cache is {self.location(request).value}"
            )
        entry.gpu_blocks = self._gpu.allocate(self.blocks_for(request.num_tokens))
        entry.location = Location.SWAPPING_IN
        self.num_arriving_blocks += len(entry.gpu_blocks)
        used = len(entry.host_blocks)
        return self._transfer(request, Direction.IN, entry.host_blocks, entry.gpu_blocks[:used])

    def complete(self, transfer: Transfer) -> None:
        """The copy has ended: free the side it left, and all of it if the request ended meanwhile."""
        entry = self._entries[transfer.request.request_id]
        self.num_transfers -= 1
        if transfer.direction is Direction.OUT:
            self.num_vacating_blocks -= len(entry.gpu_blocks)
            self._gpu.free(entry.gpu_blocks)
            entry.gpu_blocks = []
            entry.location = Location.HOST
        else:
            self.num_arriving_blocks -= len(entry.gpu_blocks)
            self._host.free(entry.host_blocks)
            entry.host_blocks = []
            entry.location = Location.GPU
            entry.request.cache_state = RESIDENT
            entry.request.cache_capacity = len(entry.gpu_blocks) * self.block_size
        if transfer.request.status is not RequestStatus.ACTIVE:
            self.release(transfer.request)

    def drop(self, request: Request) -> int:
        """Forget a resident request's cache, to be recomputed later. Returns the number of computed tokens lost."""
        self._resident(request)
        self.release(request)
        lost = request.num_computed_tokens
        request.num_computed_tokens = 0
        return lost

    def release(self, request: Request) -> None:
        """Free everything a request owns. If a transfer is under way, `complete` does so when it ends."""
        entry = self._entries.get(request.request_id)
        if entry is None or entry.location in (Location.SWAPPING_OUT, Location.SWAPPING_IN):
            return
        del self._entries[request.request_id]
        request.cache_state = NO_CACHE
        request.cache_capacity = 0
        self._gpu.free(entry.gpu_blocks)
        self._host.free(entry.host_blocks)

    # -- integrity ---------------------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Raise CacheError where I2 is broken: free + owned = total in each pool, no block with two owners."""
        entries = self._entries.values()
        self._gpu.check([block for entry in entries for block in entry.gpu_blocks])
        self._host.check([block for entry in entries for block in entry.host_blocks])
        for location, counted in (
            (Location.SWAPPING_OUT, self.num_vacating_blocks),
            (Location.SWAPPING_IN, self.num_arriving_blocks),
        ):
            moving = sum(len(entry.gpu_blocks) for entry in entries if entry.location is location)
            if moving != counted:
                raise CacheError(f"{moving} GPU blocks are {location.value}, {counted} were counted")
        for entry in entries:
            request, resident = entry.request, entry.location is Location.GPU
            if request.cache_state != (RESIDENT if resident else SWAPPED_OUT):
                raise CacheError(f"request {request.request_id}: wrong cache_state {request.cache_state}")
            if request.cache_capacity != (len(entry.gpu_blocks) * self.block_size if resident else 0):
                raise CacheError(f"request {request.request_id}: wrong cache_capacity {request.cache_capacity}")
            if resident and request.num_computed_tokens > request.cache_capacity:
                raise OutOfBlocksError(
                    f"request {request.request_id}: {request.num_computed_tokens} tokens computed, "
                    f"room for {request.cache_capacity}"
                )

    # -- helpers -----------------------------------------------------------------------------------------------

    def _resident(self, request: Request) -> _Entry:
        entry = self._entries.get(request.request_id)
        if entry is None or entry.location is not Location.GPU:
            raise WrongLocationError(
                f"request {request.request_id} is not on the GPU: its cache is {self.location(request).value}"
            )
        return entry

    def _transfer(self, request: Request, direction: Direction, source: list[int], destination: list[int]) -> Transfer:
        self.num_transfers += 1
        num_bytes = len(source) * self.config.block_bytes
        return Transfer(request, direction, tuple(source), tuple(destination), num_bytes)

"""KVCacheManager: where every request's cache is, and which blocks hold it.

`Request.cache_state` and `Request.cache_capacity` are set here and nowhere else.
"""

from __future__ import annotations

import enum
from typing import Final

from fastserve.core.config import CacheConfig
from fastserve.core.request import NO_CACHE, RESIDENT, SWAPPED_OUT, Location, Request, RequestStatus
from fastserve.kvcache.block_pool import BlockPool
from fastserve.kvcache.errors import CacheError, OutOfBlocksError, WrongLocationError
from fastserve.kvcache.oldest_first_pool import OldestFirstPool
from fastserve.kvcache.prefix_cache import PrefixCache


class Direction(enum.Enum):
    """Direction of a transfer, as seen from the GPU."""

    OUT = "out"
    IN = "in"


# Faster to look up than members of the classes.
OUT: Final = Direction.OUT
IN: Final = Direction.IN
NONE: Final = Location.NONE
GPU: Final = Location.GPU
HOST: Final = Location.HOST
SWAPPING_OUT: Final = Location.SWAPPING_OUT
SWAPPING_IN: Final = Location.SWAPPING_IN


class Transfer:
    """One request's cache in transfer between the pools: block source[i] is copied to block destination[i]."""

    __slots__ = ("destination", "direction", "is_complete", "num_bytes", "request", "source")

    def __init__(
        self,
        request: Request,
        direction: Direction,
        source: tuple[int, ...],
        destination: tuple[int, ...],
        num_bytes: int,
    ) -> None:
        self.request = request
        self.direction = direction
        self.source = source
        self.destination = destination
        self.num_bytes = num_bytes
        self.is_complete = False
        """Whether the cache counts as moved: since the copy has ended, or since its policy does not wait for that."""


class KVCacheManager:
    """Owns the GPU and the host block pool and every request's block table.

    Blocks under a transfer belong to the request on both sides until `complete` is called. So no block is given away
    before its copy has ended, and an executor needs no dependencies between blocks.

    With `config.prefix_caching` a request whose cache was dropped takes up its first blocks again, as far as they were
    not given out meanwhile.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.block_size = config.block_size
        self._gpu = BlockPool("GPU", config.num_gpu_blocks)
        self.caches_prefixes = config.prefix_caching
        self._prefixes = PrefixCache()
        self._found: OldestFirstPool | None = None
        """With prefix caching: the GPU pool, from which certain blocks can be taken."""
        if self.caches_prefixes:
            self._gpu = self._found = OldestFirstPool("GPU", config.num_gpu_blocks)
        self._host = BlockPool("host", config.num_host_blocks)
        self._owners: dict[str, Request] = {}
        """Requests with a cache, by id."""
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
        return request.location

    def block_table(self, request: Request) -> list[int]:
        """GPU blocks of a resident request, in token order. Not a copy: do not change it."""
        self._require_resident(request)
        return request.gpu_blocks

    def num_blocks(self, request: Request) -> int:
        """Blocks the request holds where its cache is now (on the GPU during a transfer)."""
        return len(request.gpu_blocks) or len(request.host_blocks)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def blocks_to_hold(self, request: Request, num_tokens: int) -> int:
        """GPU blocks to find before the request, wherever its cache is, can hold `num_tokens` tokens on the GPU."""
        return max(0, self.blocks_for(num_tokens) - len(request.gpu_blocks))

    def num_found_tokens(self, request: Request) -> int:
        """Tokens, in whole blocks, that a request without a cache need not compute again, if it gets room now.

        At least one token is left to compute.
        """
        return len(self._find(request)) * self.block_size if self.caches_prefixes else 0

    def resident_requests(self) -> list[Request]:
        """Requests whose cache is wholly on the GPU and not in transfer."""
        return [request for request in self._owners.values() if request.location is GPU]

    # -- changes -----------------------------------------------------------------------------------------------

    def extend(self, request: Request, num_tokens: int) -> None:
        """Give the request, new or resident, room on the GPU for `num_tokens` tokens in all.

        With prefix caching, a request without a cache has computed tokens after this: `num_found_tokens`.
        """
        if request.location is NONE:
            count = self.blocks_for(num_tokens)
            blocks = self._allocate_anew(request, count) if self.caches_prefixes else self._gpu.allocate(count)
            request.gpu_blocks = blocks
            self._owners[request.request_id] = request
            request.location = GPU
            request.cache_state = RESIDENT
            request.cache_capacity = len(blocks) * self.block_size
            return
        if request.location is not GPU:
            raise WrongLocationError(f"request {request.request_id} cannot grow: its cache is {request.location.value}")
        if num_tokens > request.cache_capacity:
            blocks = request.gpu_blocks
            blocks += self._allocate(self.blocks_for(num_tokens) - len(blocks))
            request.cache_capacity = len(blocks) * self.block_size

    def begin_swap_out(self, request: Request) -> Transfer:
        """Start moving a resident request's computed cache to host memory; its GPU blocks are freed by `complete`.

        Raises OutOfBlocksError, and changes nothing, when the host pool is full.
        """
        self._require_resident(request)
        # Blocks allocated ahead of computation hold nothing and need no copy.
        used = self.blocks_for(request.num_computed_tokens)
        request.host_blocks = self._host.allocate(used)
        request.location = SWAPPING_OUT
        request.cache_state = SWAPPED_OUT
        request.cache_capacity = 0
        self.num_vacating_blocks += len(request.gpu_blocks)
        source = request.gpu_blocks
        return self._transfer(request, OUT, source if len(source) == used else source[:used], request.host_blocks)

    def begin_swap_in(self, request: Request) -> Transfer:
        """Start moving a request's cache back to the GPU, with room for the tokens it has to compute next.

        Its host blocks are freed by `complete`. Raises OutOfBlocksError, and changes nothing, when the GPU pool is
        short.
        """
        if request.location is not HOST:
            raise WrongLocationError(
                f"request {request.request_id} cannot be swapped in: its cache is {request.location.value}"
            )
        request.gpu_blocks = self._allocate(self.blocks_for(request.num_tokens))
        request.location = SWAPPING_IN
        self.num_arriving_blocks += len(request.gpu_blocks)
        used, destination = len(request.host_blocks), request.gpu_blocks
        return self._transfer(
            request, IN, request.host_blocks, destination if len(destination) == used else destination[:used]
        )

    def complete(self, transfer: Transfer) -> None:
        """The copy has ended: free the side it left, and all of it if the request ended meanwhile."""
        request = transfer.request
        transfer.is_complete = True
        self.num_transfers -= 1
        if transfer.direction is OUT:
            self.num_vacating_blocks -= len(request.gpu_blocks)
            self._gpu.free(request.gpu_blocks)
            request.gpu_blocks = []
            request.location = HOST
        else:
            self.num_arriving_blocks -= len(request.gpu_blocks)
            self._host.free(request.host_blocks)
            request.host_blocks = []
            request.location = GPU
            request.cache_state = RESIDENT
            request.cache_capacity = len(request.gpu_blocks) * self.block_size
        if request.status is not RequestStatus.ACTIVE:
            self.release(request)

    def drop(self, request: Request) -> int:
        """Forget a resident request's cache, to be recomputed later. Returns the number of computed tokens lost."""
        self._require_resident(request)
        lost = request.num_computed_tokens
        if self.caches_prefixes:
            self._prefixes.remember(request, request.gpu_blocks[: lost // self.block_size])
            request.num_lost_tokens = lost
        self.release(request)
        request.num_computed_tokens = 0
        return lost

    def release(self, request: Request) -> None:
        """Free everything a request owns. If a transfer is under way, `complete` does so when it ends."""
        location = request.location
        if location is NONE or location is SWAPPING_OUT or location is SWAPPING_IN:
            return
        del self._owners[request.request_id]
        request.location = NONE
        request.cache_state = NO_CACHE
        request.cache_capacity = 0
        self._gpu.free(request.gpu_blocks)
        self._host.free(request.host_blocks)
        request.gpu_blocks = []
        request.host_blocks = []

    # -- integrity ---------------------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Raise CacheError where I2 is broken: free + owned = total in each pool, no block with two owners."""
        owners = self._owners.values()
        self._gpu.check([block for request in owners for block in request.gpu_blocks])
        self._host.check([block for request in owners for block in request.host_blocks])
        for location, counted in ((SWAPPING_OUT, self.num_vacating_blocks), (SWAPPING_IN, self.num_arriving_blocks)):
            moving = sum([len(request.gpu_blocks) for request in owners if request.location is location])
            if moving != counted:
                raise CacheError(f"{moving} GPU blocks are {location.value}, {counted} were counted")
        for request in owners:
            resident = request.location is GPU
            if request.cache_state != (RESIDENT if resident else SWAPPED_OUT):
                raise CacheError(f"request {request.request_id}: wrong cache_state {request.cache_state}")
            if request.cache_capacity != (len(request.gpu_blocks) * self.block_size if resident else 0):
                raise CacheError(f"request {request.request_id}: wrong cache_capacity {request.cache_capacity}")
            if resident and request.num_computed_tokens > request.cache_capacity:
                raise OutOfBlocksError(
                    f"request {request.request_id}: {request.num_computed_tokens} tokens computed, "
                    f"room for {request.cache_capacity}"
                )

    # -- helpers -----------------------------------------------------------------------------------------------

    def _find(self, request: Request) -> list[int]:
        """Free blocks that hold the first tokens of a request without a cache, its last token left out."""
        return self._prefixes.find(request, (request.num_tokens - 1) // self.block_size)

    def _allocate(self, count: int) -> list[int]:
        blocks = self._gpu.allocate(count)
        if self.caches_prefixes:
            self._prefixes.forget(blocks)
        return blocks

    def _allocate_anew(self, request: Request, count: int) -> list[int]:
        """Blocks for a request without a cache: those that hold its first tokens, and others."""
        pool = self._found
        assert pool is not None
        if count > pool.num_free:
            return pool.allocate(count)  # Which says what is missing.
        found = self._find(request)[:count]
        pool.take_up(found)
        request.num_computed_tokens = len(found) * self.block_size
        return found + self._allocate(count - len(found))

    def _require_resident(self, request: Request) -> None:
        if request.location is not GPU:
            raise WrongLocationError(
                f"request {request.request_id} is not on the GPU: its cache is {request.location.value}"
            )

    def _transfer(self, request: Request, direction: Direction, source: list[int], destination: list[int]) -> Transfer:
        self.num_transfers += 1
        num_bytes = len(source) * self.config.block_bytes
        return Transfer(request, direction, tuple(source), tuple(destination), num_bytes)

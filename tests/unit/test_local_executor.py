"""The copies of the real executor, under load."""

import random
import time
from collections.abc import Callable, Sequence

import pytest

torch = pytest.importorskip("torch")

from fastserve.clock import WallClock  # noqa: E402
from fastserve.config import CacheConfig  # noqa: E402
from fastserve.executor.local import LocalExecutor  # noqa: E402
from fastserve.kvcache import KVCacheManager, Location, Transfer  # noqa: E402
from fastserve.kvcache.errors import OutOfBlocksError  # noqa: E402
from fastserve.presets import preset  # noqa: E402
from fastserve.request import Request, RequestStatus, SamplingParams  # noqa: E402
from fastserve.scheduler import Iteration  # noqa: E402
from fastserve.worker import Worker  # noqa: E402

BLOCK_SIZE, GPU_BLOCKS, HOST_BLOCKS = 16, 32, 24
ENOUGH_SWAPS = 250
LONGEST_DELAY_S = 0.01
"""Of a copy: some iterations are over before it begins, and its blocks must have stayed as they were."""


class Caches:
    """Requests whose caches hold known values, moved by a LocalExecutor: nothing but the copies carries them."""

    def __init__(self, seed: int) -> None:
        model = preset("llama-tiny")
        self.rng = random.Random(seed)
        self.kv = KVCacheManager(CacheConfig(GPU_BLOCKS, HOST_BLOCKS, BLOCK_SIZE, model.kv_bytes_per_token("float32")))
        self.worker = Worker(
            model, num_gpu_blocks=GPU_BLOCKS, num_host_blocks=HOST_BLOCKS, block_size=BLOCK_SIZE, device="cpu"
        )
        self.delays = random.Random(seed)
        self.worker.copy_out, self.worker.copy_in = map(self.late, (self.worker.copy_out, self.worker.copy_in))
        self.executor = LocalExecutor(self.worker, self.kv, WallClock())
        self.requests: dict[str, Request] = {}
        self.written: dict[str, list[torch.Tensor]] = {}
        """What each request's blocks were filled with, in token order."""
        self.num_made = self.num_swapped_in = self.num_computed = 0

    def late(self, copy: Callable[..., None]) -> Callable[[Sequence[int], Sequence[int]], None]:
        def copy_late(source: Sequence[int], target: Sequence[int]) -> None:
            time.sleep(self.delays.uniform(0, LONGEST_DELAY_S))
            copy(source, target)

        return copy_late

    def at(self, *locations: Location) -> list[Request]:
        return [request for request in self.requests.values() if self.kv.location(request) in locations]

    def admit(self) -> None:
        """A new request gets blocks, perhaps some that a copy has just left, and they are overwritten at once."""
        tokens = self.rng.randint(1, 6 * BLOCK_SIZE)
        request = Request.from_tokens(str(self.num_made), 0.0, [self.rng.randrange(500) for _ in range(tokens)])
        if self.kv.blocks_for(tokens) <= self.kv.num_free_gpu_blocks:
            self.num_made += 1
            self.kv.extend(request, tokens)
            request.num_computed_tokens = tokens
            request.num_tokens += 1
            request.token_ids.append(7)
            self.requests[request.request_id] = request
            self.executor.add_request(request, SamplingParams())
            self.fill(request, 0)

    def fill(self, request: Request, first: int) -> None:
        """Write random values from block `first` on."""
        known = self.written.setdefault(request.request_id, [])
        del known[first:]
        for block in self.kv.block_table(request)[first:]:
            values = torch.rand(self.worker.gpu_cache.shape[1:], generator=self.generator())
            self.worker.gpu_cache[block] = values
            known.append(values)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.rng.randrange(2**40))

    def check(self, request: Request) -> None:
        """Every computed block holds what was written."""
        used = self.kv.blocks_for(request.num_computed_tokens)
        table = self.kv.block_table(request)
        written = self.written[request.request_id]
        for index, (block, values) in enumerate(zip(table[:used], written[:used], strict=True)):
            assert torch.equal(self.worker.gpu_cache[block], values), (
                f"block {index} of request {request.request_id} was lost, {self.num_swapped_in} swap-ins in"
            )

    def swaps(self) -> tuple[list[Transfer], list[Transfer]]:
        """Some out, some in, as far as the pools go."""
        out, back = [], []
        for request in self.rng.sample(here := self.at(Location.GPU), min(len(here), self.rng.randint(0, 3))):
            try:
                out.append(self.kv.begin_swap_out(request))
            except OutOfBlocksError:
                break
        for request in self.rng.sample(away := self.at(Location.HOST), min(len(away), self.rng.randint(0, 3))):
            try:
                back.append(self.kv.begin_swap_in(request))
            except OutOfBlocksError:
                break
        return out, back

    def turn(self) -> None:
        """What an engine does: copies start, an iteration is computed beside them, and some of them end."""
        out, back = self.swaps()
        here = self.at(Location.GPU)
        batch = tuple(self.rng.sample(here, min(len(here), self.rng.randint(0, 3))))
        for request in list(batch):
            try:
                self.kv.extend(request, request.num_tokens)
            except OutOfBlocksError:
                batch = tuple(other for other in batch if other is not request)
        self.executor.submit(Iteration(batch, (1,) * len(batch), tuple(out), tuple(back)))
        self.admit()
        if batch:
            self.executor.collect()
            self.num_computed += 1
            for request in batch:
                self.advance(request)
        self.complete()

    def turn_until(self, num_swapped_in: int) -> None:
        while self.num_swapped_in < num_swapped_in:
            self.turn()

    def advance(self, request: Request) -> None:
        """One token more: it changed one slot of one block, which is noted, and nothing else."""
        index, slot = divmod(request.num_computed_tokens, BLOCK_SIZE)
        block = self.worker.gpu_cache[self.kv.block_table(request)[index]]
        known = self.written[request.request_id]
        if index == len(known):
            known.append(block.clone())
        known[index][:, :, slot] = block[:, :, slot]
        request.num_computed_tokens += 1
        request.num_tokens += 1
        request.token_ids.append(7)
        self.check(request)
        if request.num_tokens > 8 * BLOCK_SIZE:
            self.end(request)

    def end(self, request: Request) -> None:
        """It leaves, in the midst of a copy perhaps, and its blocks go to others."""
        request.status = RequestStatus.FINISHED
        self.kv.release(request)
        self.executor.remove_request(request)
        del self.requests[request.request_id], self.written[request.request_id]

    def complete(self) -> None:
        """Take note of the copies that have ended, and look at what came back."""
        for finished in self.executor.finished_transfers():
            request = finished.transfer.request
            self.kv.complete(finished.transfer)
            if request.request_id in self.requests and self.kv.location(request) is Location.GPU:
                self.num_swapped_in += 1
                self.check(request)
        self.kv.check_invariants()


@pytest.mark.parametrize("seed", range(2))
def test_caches_survive_random_swaps_beside_the_computation(seed: int) -> None:
    caches = Caches(seed)
    try:
        turns = 0
        while caches.num_swapped_in < ENOUGH_SWAPS:
            turns += 1
            assert turns < 20 * ENOUGH_SWAPS, "hardly anything moves"
            caches.turn()
            if caches.requests and caches.rng.random() < 0.1:
                caches.end(caches.rng.choice(list(caches.requests.values())))
        while caches.executor.num_transfers_in_flight:
            caches.executor.wait(float("inf"))
            caches.complete()
        for request in caches.at(Location.GPU):
            caches.check(request)
        for request in list(caches.requests.values()):
            caches.end(request)
        caches.kv.check_invariants()
        assert (caches.kv.num_free_gpu_blocks, caches.kv.num_free_host_blocks) == (GPU_BLOCKS, HOST_BLOCKS)
        assert caches.num_computed > ENOUGH_SWAPS / 4
    finally:
        caches.executor.close()


def test_a_lost_block_is_noticed() -> None:
    """The test above is worth nothing if it does not see a copy that goes astray."""
    caches = Caches(0)
    copy_in = caches.worker.copy_in
    caches.worker.copy_in = lambda source, target: copy_in(source[:-1], target[:-1])
    try:
        with pytest.raises(AssertionError, match="was lost"):
            caches.turn_until(ENOUGH_SWAPS)
    finally:
        caches.executor.close()

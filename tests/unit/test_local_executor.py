"""The copies of the real executor, under load."""

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fastserve.core.clock import WallClock  # noqa: E402
from fastserve.core.config import CacheConfig  # noqa: E402
from fastserve.core.presets import preset  # noqa: E402
from fastserve.core.request import Request, RequestStatus, SamplingParams  # noqa: E402
from fastserve.kvcache import Direction, KVCacheManager, Location, Transfer  # noqa: E402
from fastserve.kvcache.errors import OutOfBlocksError  # noqa: E402
from fastserve.runtime.executors import local  # noqa: E402
from fastserve.runtime.worker import Worker  # noqa: E402
from fastserve.runtime.worker.copier import FinishedCopy, StreamCopier, ThreadCopier  # noqa: E402
from fastserve.scheduler import Iteration  # noqa: E402
from support.devices import DEVICES  # noqa: E402

MODEL_AND_DTYPE = {"cpu": ("opt-tiny", "float32"), "cuda": ("llama-160m", "float16")}
"""On a GPU a larger one, whose blocks take as long to copy as an iteration's kernels to run."""
BLOCK_SIZE, GPU_BLOCKS, HOST_BLOCKS = 16, 32, 24
SEEDS = range(2)
ENOUGH_SWAPS = 10_000 // len(SEEDS)
LONGEST_DELAY_S = 0.004
"""Of a copy: some iterations are over before it begins, and its blocks must have stayed as they were."""


class Late:
    """Copies begin some time after they were started."""

    def __init__(self, *pools_and_clock: Any) -> None:
        super().__init__(*pools_and_clock)
        self._delays = random.Random(0)

    def delay(self) -> float:
        return self._delays.uniform(0, LONGEST_DELAY_S)


class LateThreadCopier(Late, ThreadCopier):
    def _copy(self, *copy: Any) -> FinishedCopy:
        time.sleep(self.delay())
        return super()._copy(*copy)


class LateStreamCopier(Late, StreamCopier):
    def start(self, direction: Direction, source: Sequence[int], destination: Sequence[int], tag: object) -> None:
        with torch.cuda.stream(self._streams[direction]):
            torch.cuda._sleep(int(self.delay() * 1e9))  # At more than 1 GHz: shorter on a GPU.
        super().start(direction, source, destination, tag)


class Forgetful:
    """The last block of a transfer stays behind."""

    def start(self, direction: Direction, source: Sequence[int], destination: Sequence[int], tag: object) -> None:
        super().start(direction, source[:-1], destination[:-1], tag)


class Astray:
    """What comes back comes to the wrong places, those of other blocks of the same request."""

    def start(self, direction: Direction, source: Sequence[int], destination: Sequence[int], tag: object) -> None:
        turned = 1 if direction is Direction.IN else 0
        super().start(direction, source, [*destination[turned:], *destination[:turned]], tag)


class Hasty:
    """What leaves is reported as gone when its copy is started, so that others get the blocks while it reads them."""

    def __init__(self, *pools_and_clock: Any) -> None:
        super().__init__(*pools_and_clock)
        self._reported_early: list[FinishedCopy] = []

    def start(self, direction: Direction, source: Sequence[int], destination: Sequence[int], tag: object) -> None:
        super().start(direction, source, destination, tag)
        if direction is Direction.OUT:
            self._reported_early.append(FinishedCopy(tag, 0.0, 0.0))

    def finished(self) -> list[FinishedCopy]:
        back = [copy for copy in super().finished() if copy.tag.direction is Direction.IN]
        early, self._reported_early = self._reported_early, []
        return early + back


class Caches:
    """Requests whose caches hold known values, moved by a LocalExecutor: nothing but the copies carries them.

    Known by a checksum of every slot of every block, odd multiples of the bits added up: a value that changed, or any
    part of a block that is in another's place, changes it.
    """

    def __init__(self, device: str, seed: int, *faults: type) -> None:
        name, dtype = MODEL_AND_DTYPE[device]
        model = preset(name)
        if device == "cpu":  # What follows the cache does not matter, and the logits would take half the time.
            model = replace(model, vocab_size=512)
        self.rng = random.Random(seed)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.kv = KVCacheManager(CacheConfig(GPU_BLOCKS, HOST_BLOCKS, BLOCK_SIZE, model.kv_bytes_per_token(dtype)))
        self.worker = Worker(
            model,
            num_gpu_blocks=GPU_BLOCKS,
            num_host_blocks=HOST_BLOCKS,
            block_size=BLOCK_SIZE,
            device=device,
            dtype=dtype,
            max_batch_size=4,
            max_model_len=9 * BLOCK_SIZE,
        )
        self.bits = {2: torch.int16, 4: torch.int32}[self.worker.gpu_cache.element_size()]
        num_layers, kinds, _, *heads = self.worker.gpu_cache.shape[1:]
        self.factors = torch.randint(
            2**62, (num_layers, kinds, 1, *heads), generator=self.generator, device=device
        ).bitwise_or(1)
        late = LateThreadCopier if device == "cpu" else LateStreamCopier
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(local, "make_copier", type("Copier", (*faults, late), {}))
            self.executor = local.LocalExecutor(self.worker, self.kv, WallClock())
        self.requests: dict[str, Request] = {}
        self.written: dict[str, list[list[int]]] = {}
        """Checksums of each request's blocks, in token order."""
        self.num_made = self.num_swapped = self.num_computed = 0

    def checksums(self, blocks: Sequence[int]) -> list[list[int]]:
        """One for each slot of each block."""
        bits = self.worker.gpu_cache[list(blocks)].view(self.bits).long()
        return (bits * self.factors).sum((1, 2, 4, 5)).tolist()

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
            self.fill(self.kv.block_table(request))
            self.written[request.request_id] = self.checksums(self.kv.block_table(request))

    def fill(self, blocks: Sequence[int]) -> None:
        """Write random values."""
        cache = self.worker.gpu_cache
        values = (len(blocks), *cache.shape[1:])
        cache[list(blocks)] = torch.rand(values, generator=self.generator, dtype=cache.dtype, device=cache.device)

    def check(self, requests: Sequence[Request]) -> None:
        """Every computed block holds what was written."""
        used = [self.kv.blocks_for(request.num_computed_tokens) for request in requests]
        tables = [self.kv.block_table(request)[:count] for request, count in zip(requests, used, strict=True)]
        found = iter(self.checksums([block for table in tables for block in table]))
        for request, count in zip(requests, used, strict=True):
            for index, written in enumerate(self.written[request.request_id][:count]):
                assert next(found) == written, (
                    f"block {index} of request {request.request_id} was lost, {self.num_swapped} swaps in"
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
        batch = tuple(self.rng.sample(here, min(len(here), self.rng.choice((0, 0, 1, 3)))))
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
            self.advance(batch)
        elif self.executor.num_transfers_in_flight:
            self.executor.wait(float("inf"))
        self.complete()

    def turn_until(self, num_swapped: int) -> None:
        turns = 0
        while self.num_swapped < num_swapped:
            turns += 1
            assert turns < 5 * num_swapped, "hardly anything moves"
            self.turn()
            if self.requests and self.rng.random() < 0.1:
                self.end(self.rng.choice(list(self.requests.values())))

    def advance(self, batch: Sequence[Request]) -> None:
        """One token more: it changed one slot of one block, which is noted, and nothing else."""
        places = [divmod(request.num_computed_tokens, BLOCK_SIZE) for request in batch]
        changed = [self.kv.block_table(request)[index] for request, (index, _) in zip(batch, places, strict=True)]
        for request, (index, slot), found in zip(batch, places, self.checksums(changed), strict=True):
            written = self.written[request.request_id]
            if index == len(written):
                written.append(found)
            written[index][slot] = found[slot]
            request.num_computed_tokens += 1
            request.num_tokens += 1
            request.token_ids.append(7)
        self.check(batch)
        for request in batch:
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
        back = []
        for finished in self.executor.finished_transfers():
            transfer, start, end = finished.transfer, finished.start_s, finished.end_s
            assert start <= end
            self.num_swapped += 1
            self.kv.complete(transfer)
            if transfer.request.request_id in self.requests and self.kv.location(transfer.request) is Location.GPU:
                back.append(transfer.request)
        if back:
            self.check(back)
        self.kv.check_invariants()


@DEVICES
@pytest.mark.parametrize("seed", SEEDS)
def test_caches_survive_random_swaps_beside_the_computation(device: str, seed: int) -> None:
    """10,000 swaps in all."""
    caches = Caches(device, seed)
    try:
        caches.turn_until(ENOUGH_SWAPS)
        while caches.executor.num_transfers_in_flight:
            caches.executor.wait(float("inf"))
            caches.complete()
        caches.check(caches.at(Location.GPU))
        for request in list(caches.requests.values()):
            caches.end(request)
        caches.kv.check_invariants()
        assert (caches.kv.num_free_gpu_blocks, caches.kv.num_free_host_blocks) == (GPU_BLOCKS, HOST_BLOCKS)
        assert caches.num_computed > ENOUGH_SWAPS / 4
    finally:
        caches.executor.close()


@DEVICES
@pytest.mark.parametrize("fault", [Forgetful, Astray, Hasty])
def test_a_lost_block_is_noticed(device: str, fault: type) -> None:
    """The test above is worth nothing if it does not see a copy that goes astray, or of what others wrote."""
    caches = Caches(device, 0, fault)
    try:
        with pytest.raises(AssertionError, match="was lost"):
            caches.turn_until(ENOUGH_SWAPS)
    finally:
        caches.executor.close()


@DEVICES
def test_a_single_changed_value_is_noticed(device: str) -> None:
    caches = Caches(device, 0)
    try:
        while not caches.requests:
            caches.admit()
        (request,) = caches.requests.values()
        caches.check([request])
        caches.worker.gpu_cache[caches.kv.block_table(request)[0]][1, 1, 0, 1, 3] = 2.0
        with pytest.raises(AssertionError, match="was lost"):
            caches.check([request])
    finally:
        caches.executor.close()

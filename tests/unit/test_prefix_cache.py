"""Prefix caching: a dropped cache is found again as far as its blocks were not given out; the order of their reuse."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.config import CacheConfig, EngineOptions
from fastserve.core.errors import ConfigError
from fastserve.core.request import Request
from fastserve.engine import Job
from fastserve.kvcache import KVCacheManager
from fastserve.kvcache.errors import BlockOwnershipError, OutOfBlocksError
from fastserve.kvcache.oldest_first_pool import OldestFirstPool
from fastserve.policies.settings import resolve_settings
from support.engines import arrival, make_engine
from support.watch import Watch, watch


def manager(num_blocks: int = 8) -> KVCacheManager:
    return KVCacheManager(CacheConfig(num_blocks, 8, block_size=4, bytes_per_token=10, prefix_caching=True))


def computed(kv: KVCacheManager, name: str, num_tokens: int) -> Request:
    """A request with so many tokens computed, and one more to compute."""
    request = Request(name, 0.0, num_tokens)
    kv.extend(request, num_tokens)
    request.num_computed_tokens = num_tokens
    request.num_tokens += 1
    return request


# -- the pool ----------------------------------------------------------------------------------------------------------


def test_blocks_are_reused_in_the_order_in_which_they_were_freed() -> None:
    pool = OldestFirstPool("GPU", 8)
    first, second = pool.allocate(3), pool.allocate(2)
    assert (first, second) == ([0, 1, 2], [3, 4])
    pool.free(first)
    pool.free(second)
    # Those never used come first; of blocks freed together the last.
    assert pool.allocate(8) == [5, 6, 7, 2, 1, 0, 4, 3]
    with pytest.raises(OutOfBlocksError, match="1 blocks asked for, 0 of 8 free"):
        pool.allocate(1)


def test_a_free_block_can_be_taken_by_its_number() -> None:
    pool = OldestFirstPool("GPU", 4)
    pool.free(pool.allocate(4))
    pool.take_up([0, 2])
    pool.check([0, 2])
    assert pool.num_free == 2
    assert pool.allocate(2) == [3, 1]


def test_a_block_freed_twice_is_noticed() -> None:
    pool = OldestFirstPool("GPU", 3)
    blocks = pool.allocate(2)
    pool.free(blocks)
    with pytest.raises(BlockOwnershipError, match="freed twice"):
        pool.free(blocks)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=40))
def test_a_pool_gives_out_every_block_once(steps: list[tuple[bool, int]]) -> None:
    pool, owned = OldestFirstPool("GPU", 16), list[int]()
    for allocates, count in steps:
        if allocates and count <= pool.num_free:
            owned += pool.allocate(count)
        elif not allocates:
            freed, owned = owned[:count], owned[count:]
            pool.free(freed)
        pool.check(owned)


# -- what is found -----------------------------------------------------------------------------------------------------


def test_a_dropped_cache_is_found_whole_while_its_blocks_are_free() -> None:
    kv = manager()
    a = computed(kv, "a", 10)
    table = list(kv.block_table(a))
    assert kv.drop(a) == 10
    assert kv.num_found_tokens(a) == 8  # Two full blocks.
    kv.extend(a, 11)
    assert a.num_computed_tokens == 8
    assert kv.block_table(a)[:2] == table[:2]
    kv.check_invariants()


def test_one_token_is_always_computed() -> None:
    kv = manager()
    a = Request("a", 0.0, 8)
    kv.extend(a, 8)
    a.num_computed_tokens = 8
    kv.drop(a)
    assert kv.num_found_tokens(a) == 4


def test_a_block_that_was_not_full_is_not_found() -> None:
    kv = manager()
    a = Request("a", 0.0, 20)
    kv.extend(a, 10)
    a.num_computed_tokens = 10  # A chunk of its prompt.
    kv.drop(a)
    assert kv.num_found_tokens(a) == 8


def test_blocks_that_were_given_out_are_not_found_and_the_first_last_longest() -> None:
    kv = manager(6)
    a = computed(kv, "a", 16)
    kv.drop(a)  # Blocks 3, 2, 1, 0 are free in this order, after 4 and 5, which were never used.
    b = computed(kv, "b", 12)
    assert kv.num_found_tokens(a) == 12
    c = computed(kv, "c", 8)
    assert kv.num_found_tokens(a) == 4
    kv.release(b)
    assert kv.num_found_tokens(a) == 4
    kv.extend(a, 17 - 1)
    assert a.num_computed_tokens == 4
    assert kv.num_found_tokens(c) == 0
    kv.check_invariants()


def test_a_request_of_the_same_name_finds_nothing() -> None:
    kv = manager()
    kv.drop(computed(kv, "a", 10))
    assert kv.num_found_tokens(Request("a", 0.0, 11)) == 0


def test_a_cache_swapped_out_and_in_is_found_where_it_is_dropped() -> None:
    kv = manager()
    a = computed(kv, "a", 10)
    kv.drop(a)
    kv.extend(a, 11)
    a.num_computed_tokens = 11
    kv.complete(kv.begin_swap_out(a))
    kv.complete(kv.begin_swap_in(a))
    table = list(kv.block_table(a))
    kv.drop(a)
    kv.extend(a, 11)
    assert kv.block_table(a)[:2] == table[:2]
    b = computed(kv, "b", 4 * 4)
    assert not set(kv.block_table(b)) & set(kv.block_table(a))
    kv.check_invariants()


# -- in an engine ------------------------------------------------------------------------------------------------------


def run(*jobs: tuple[str, float, int, int], v1: bool = True, **how: Any) -> tuple[Watch, list[Job]]:
    engine = make_engine("vllm-chunked", {"v1": v1, "watermark": 0.0, "chunk_tokens": 64}, **how)
    kept = watch(engine)
    return kept, engine.run([arrival(*job) for job in jobs])


def test_only_what_is_not_found_is_recomputed_and_counted() -> None:
    jobs = [("a", 0.0, 16, 14), ("b", 0.0, 18, 20), ("c", 0.0, 19, 30)]
    for prefix_caching in (False, True):
        kept, done = run(*jobs, num_gpu_blocks=20, prefix_caching=prefix_caching)
        assert sum(job.preemptions for job in done) > 0
        for job in done:
            row = job.metrics
            lost = sum(count for name, count in kept.drops if name == row.request_id)
            assert row.recomputed_tokens + row.cached_tokens == lost
            ran = sum(
                count
                for _, iteration in kept.decisions
                for request, count in zip(iteration.requests, iteration.num_scheduled_tokens, strict=True)
                if request.request_id == row.request_id
            )
            assert ran == row.prompt_tokens + row.output_tokens - 1 + row.recomputed_tokens
        assert (sum(job.cached_tokens for job in done) > 0) == prefix_caching


def test_a_newest_request_without_a_block_loses_its_own_cache() -> None:
    """a and b fill the pool; when b, the newest, needs a block, v1 drops b, and the old rule lets it wait."""
    jobs = [("a", 0.0, 7, 12), ("b", 0.0, 12, 6)]
    for v1, dropped_at in ((True, 1), (False, 2)):
        kept, done = run(*jobs, v1=v1, num_gpu_blocks=5)
        assert kept.drops == [("b", 12)]
        assert [job.preemptions for job in done] == [0, 1]
        assert kept.batches[1] == ("a",)
        assert [bool(iteration.dropped) for _, iteration in kept.decisions].index(True) == dropped_at


def test_v1_admits_only_what_fits_as_a_whole() -> None:
    """6 of 10 blocks are taken; b needs 5, and its first chunk only 2."""
    for v1, starts in ((False, True), (True, False)):
        engine = make_engine(
            "vllm-chunked", {"v1": v1, "watermark": 0.0, "chunk_tokens": 9}, num_gpu_blocks=10, max_batch_size=2
        )
        engine.add_request(*arrival("a", 0.0, 22, 3))
        while not engine.scheduler.running or engine.kv.num_free_gpu_blocks != 4:
            engine.step()
        engine.add_request(*arrival("b", 0.0, 20, 3))
        engine.step()
        assert ("b" in engine.scheduler.running) == starts


def test_a_watermark_is_a_share() -> None:
    with pytest.raises(ConfigError, match="watermark must be a share from 0 to below 1, got 1"):
        resolve_settings("vllm-chunked", {"watermark": "1"})
    _, of_policy = resolve_settings("vllm-chunked", {"watermark": "0"})
    assert make_engine("vllm-chunked", of_policy, num_gpu_blocks=500).scheduler.policy.watermark_blocks == 0
    assert make_engine("vllm-chunked", {}, num_gpu_blocks=500).scheduler.policy.watermark_blocks == 5


def test_prefix_caching_is_an_option_of_the_engine() -> None:
    options, _ = resolve_settings("fastserve", {"prefix_caching": "true"})
    assert options.prefix_caching
    assert not EngineOptions().prefix_caching
    with pytest.raises(ConfigError, match="prefix_caching must be of type bool, got 'yes'"):
        resolve_settings("fastserve", {"prefix_caching": "yes"})

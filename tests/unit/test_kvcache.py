import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.config import CacheConfig
from fastserve.core.errors import ConfigError
from fastserve.core.request import Request, RequestStatus
from fastserve.kvcache import BlockPool, KVCacheManager, Location
from fastserve.kvcache.errors import BlockOwnershipError, OutOfBlocksError, WrongLocationError


def manager(gpu: int = 8, host: int = 8) -> KVCacheManager:
    return KVCacheManager(CacheConfig(gpu, host, block_size=4, bytes_per_token=10))


def request(name: str = "a", prompt: int = 6) -> Request:
    return Request(name, 0.0, prompt)


def test_a_request_takes_whole_blocks_and_gives_them_back() -> None:
    kv, a = manager(), request()
    assert kv.blocks_to_hold(a, 6) == 2
    kv.extend(a, 6)
    assert kv.num_free_gpu_blocks == 6
    assert kv.blocks_to_hold(a, 8) == 0
    assert kv.blocks_to_hold(a, 9) == 1
    kv.extend(a, 9)
    assert len(kv.block_table(a)) == 3
    kv.release(a)
    assert kv.num_free_gpu_blocks == 8
    assert kv.location(a) is Location.NONE


def test_blocks_in_transfer_belong_to_both_sides_until_it_ends() -> None:
    kv, a = manager(), request()
    kv.extend(a, 6)
    a.num_computed_tokens = 6
    table = tuple(kv.block_table(a))
    out = kv.begin_swap_out(a)
    assert out.source == table
    assert out.num_bytes == 2 * 4 * 10
    assert (kv.num_free_gpu_blocks, kv.num_free_host_blocks, kv.num_vacating_blocks) == (6, 6, 2)
    kv.check_invariants()
    kv.complete(out)
    assert (kv.num_free_gpu_blocks, kv.num_free_host_blocks, kv.num_vacating_blocks) == (8, 6, 0)
    back = kv.begin_swap_in(a)
    assert back.source == out.destination
    assert (kv.num_free_gpu_blocks, kv.num_free_host_blocks) == (6, 6)
    kv.complete(back)
    assert kv.num_free_host_blocks == 8
    assert kv.block_table(a) == list(back.destination)
    kv.check_invariants()


def test_only_what_was_computed_travels() -> None:
    kv, a = manager(), request(prompt=4)
    kv.extend(a, 9)
    a.num_computed_tokens = 4
    assert len(kv.begin_swap_out(a).source) == 1
    assert kv.num_vacating_blocks == 3


def test_dropping_loses_the_computed_tokens() -> None:
    kv, a = manager(), request()
    kv.extend(a, 6)
    a.num_computed_tokens = 6
    assert kv.drop(a) == 6
    assert a.num_computed_tokens == 0
    assert kv.num_free_gpu_blocks == 8


def test_a_request_that_ends_in_transfer_is_freed_when_the_copy_ends() -> None:
    kv, a = manager(), request()
    kv.extend(a, 6)
    a.num_computed_tokens = 6
    out = kv.begin_swap_out(a)
    a.status = RequestStatus.ABORTED
    kv.release(a)
    assert kv.num_free_gpu_blocks == 6
    kv.complete(out)
    assert (kv.num_free_gpu_blocks, kv.num_free_host_blocks) == (8, 8)
    assert kv.location(a) is Location.NONE


def test_a_full_host_pool_refuses_and_changes_nothing() -> None:
    kv, a = manager(host=1), request()
    kv.extend(a, 6)
    a.num_computed_tokens = 6
    with pytest.raises(OutOfBlocksError, match="2 blocks asked for, 1 of 1 free"):
        kv.begin_swap_out(a)
    assert kv.location(a) is Location.GPU
    assert kv.num_vacating_blocks == 0
    kv.check_invariants()


def test_operations_in_the_wrong_place_are_refused() -> None:
    kv, a = manager(), request()
    for operation in (kv.begin_swap_out, kv.begin_swap_in, kv.drop, kv.block_table):
        with pytest.raises(WrongLocationError, match="request a"):
            operation(a)
    kv.extend(a, 6)
    a.num_computed_tokens = 6
    kv.begin_swap_out(a)
    with pytest.raises(WrongLocationError, match="swapping_out"):
        kv.extend(a, 20)


def test_an_exhausted_pool_refuses_and_changes_nothing() -> None:
    kv, a = manager(gpu=2), request(prompt=20)
    with pytest.raises(OutOfBlocksError, match="5 blocks asked for, 2 of 2 free"):
        kv.extend(a, 20)
    assert kv.num_free_gpu_blocks == 2


def test_a_block_freed_twice_is_noticed() -> None:
    pool = BlockPool("GPU", 2)
    blocks = pool.allocate(2)
    pool.free(blocks)
    with pytest.raises(BlockOwnershipError):
        pool.free(blocks)


def test_a_block_with_two_owners_is_noticed() -> None:
    pool = BlockPool("GPU", 3)
    (block,) = pool.allocate(1)
    pool.check([block])
    with pytest.raises(BlockOwnershipError):
        pool.check([block, block])
    with pytest.raises(BlockOwnershipError):
        pool.check([])


@given(st.lists(st.integers(1, 5), max_size=20))
def test_a_pool_gives_out_every_block_once(counts: list[int]) -> None:
    pool, taken = BlockPool("GPU", 16), []
    for count in counts:
        if count <= pool.num_free:
            taken += pool.allocate(count)
        pool.check(taken)
    pool.free(taken)
    pool.check([])


def test_sizes_out_of_range_are_named() -> None:
    with pytest.raises(ConfigError, match="num_gpu_blocks must be an integer of at least 1, got 0"):
        CacheConfig(0, 1)

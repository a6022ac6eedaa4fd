"""Copies between two pools of blocks, without an engine."""

import gc
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from fastserve.core.clock import WallClock  # noqa: E402
from fastserve.core.errors import ConfigError  # noqa: E402
from fastserve.kvcache import Direction  # noqa: E402
from fastserve.runtime.worker.copier import BlockCopier, make_copier, runs, time_of  # noqa: E402
from fastserve.runtime.worker.memory import pinned_zeros  # noqa: E402
from support.devices import DEVICES, NEEDS_GPU  # noqa: E402

BLOCK = (3, 2, 4, 2, 5)
GPU_BLOCKS, HOST_BLOCKS = 12, 9


def pools(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of values that all differ."""
    gpu = torch.arange(GPU_BLOCKS * math.prod(BLOCK), dtype=torch.float32, device=device).view(-1, *BLOCK)
    host = (torch.zeros if device == "cpu" else pinned_zeros)(HOST_BLOCKS, *BLOCK, dtype=torch.float32)
    host.copy_(-1 - torch.arange(host.numel(), dtype=torch.float32).view_as(host))
    return gpu, host


@st.composite
def pairs(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Blocks, and where they go; often neighbours to neighbours."""
    count = draw(st.integers(0, 8))
    blocks = st.lists(st.integers(0, 11), min_size=count, max_size=count, unique=True)
    return draw(blocks), draw(blocks)


@given(pairs(), st.integers(1, 4))
def test_runs_are_the_pairs_in_as_few_spans_as_there_can_be(blocks: tuple[list[int], list[int]], longest: int) -> None:
    found = runs(*blocks, longest)
    unrolled = [(origin + i, target + i) for origin, target, count in found for i in range(count)]
    assert sorted(unrolled) == sorted(zip(*blocks, strict=True))
    assert all(count <= longest for _, _, count in found)
    ends = {(origin + count, target + count) for origin, target, count in found if count < longest}
    assert not ends & {(origin, target) for origin, target, _ in found}


def test_runs_of_neighbours_in_any_order() -> None:
    assert runs([4, 5, 6, 9], [1, 2, 3, 4], 9) == [(4, 1, 3), (9, 4, 1)]
    assert runs([6, 5, 4], [3, 2, 1], 9) == [(4, 1, 3)]
    assert runs([6, 5, 4], [3, 2, 1], 2) == [(4, 1, 2), (6, 3, 1)]
    assert runs([4, 5], [2, 1], 9) == [(4, 2, 1), (5, 1, 1)]
    assert runs([], [], 9) == []
    with pytest.raises(ValueError, match="shorter"):
        runs([1, 2], [3], 9)


@given(st.floats(0, 1e4), st.floats(0, 1e3), st.lists(st.floats(-1.0, 1e6), min_size=2, max_size=2).map(sorted))
def test_times_are_in_order_and_neither_before_the_start_nor_in_the_future(
    anchored: float, later: float, elapsed: list[float]
) -> None:
    now = anchored + later
    start, end = (time_of(ms, anchored, now) for ms in elapsed)
    assert anchored <= start <= end <= now
    if 0 <= elapsed[1] / 1e3 <= later / 2:
        assert end == anchored + elapsed[1] / 1e3


def test_the_time_of_an_event_is_the_anchor_s_and_what_the_device_counted() -> None:
    assert time_of(250.0, 3.0, 10.0) == 3.25


@DEVICES
def test_blocks_arrive_where_they_should_and_no_others_change(device: str) -> None:
    gpu, host = pools(device)
    gpu_before, host_before = gpu.cpu().clone(), host.clone()
    clock = WallClock()
    copier = make_copier(gpu, host, clock)
    began = clock.now()
    copier.start(Direction.OUT, [3, 4, 5, 11], [0, 1, 2, 7], "out")
    copier.start(Direction.IN, [8, 5, 6], [0, 9, 8], "in")
    copier.start(Direction.OUT, [], [], "nothing")
    assert copier.num_in_flight == 3
    finished = {}
    while copier.num_in_flight:
        copier.wait(math.inf)
        ended = copier.finished()
        assert ended, "nothing had ended when the waiting did"
        for copy in ended:
            assert began <= copy.start_s <= copy.end_s <= clock.now()
            finished[copy.tag] = copy
    assert set(finished) == {"out", "in", "nothing"}
    assert finished["out"].end_s <= finished["nothing"].start_s + 1e-4, "a direction does one thing at a time"
    assert copier.finished() == []
    gpu_wanted, host_wanted = gpu_before.clone(), host_before.clone()
    host_wanted[[0, 1, 2, 7]] = gpu_before[[3, 4, 5, 11]]
    gpu_wanted[[0, 9, 8]] = host_before[[8, 5, 6]]
    assert torch.equal(host, host_wanted)
    assert torch.equal(gpu.cpu(), gpu_wanted)
    copier.close()


def in_vain(copier: BlockCopier, source: list[int], destination: list[int]) -> None:
    copier.start(Direction.IN, source, destination, None)
    copier.wait(math.inf)
    copier.finished()


@DEVICES
@pytest.mark.parametrize(
    ("source", "destination"), [([HOST_BLOCKS], [0]), ([HOST_BLOCKS - 1, HOST_BLOCKS], [0, 1]), ([0, 1], [0])]
)
def test_a_copy_that_cannot_be_says_so(device: str, source: list[int], destination: list[int]) -> None:
    gpu, host = pools(device)
    copier = make_copier(gpu, host, WallClock())
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        in_vain(copier, source, destination)
    copier.close()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])
def test_waiting_ends_in_time_where_no_copy_does(device: str) -> None:
    gpu, host = pools(device)
    clock = WallClock()
    copier = make_copier(gpu, host, clock)
    with torch.cuda.stream(copier._streams[Direction.OUT]):
        torch.cuda._sleep(400_000_000)  # A fifth of a second or more.
    copier.start(Direction.OUT, [0], [0], "late")
    assert copier.finished() == []
    copier.wait(until := clock.now() + 0.01)
    assert until <= clock.now() < until + 0.05
    assert copier.finished() == []
    copier.start(Direction.IN, [1], [1], "soon")
    copier.wait(math.inf)
    (soon,) = copier.finished()
    copier.wait(math.inf)
    (late,) = copier.finished()
    assert (soon.tag, late.tag) == ("soon", "late")
    assert soon.end_s < late.start_s
    assert clock.now() - late.end_s < 0.01, "the device's time is not the clock's"
    copier.close()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])
def test_memory_is_page_locked(device: str) -> None:
    _, host = pools(device)
    assert host.is_pinned()
    assert pinned_zeros(0, *BLOCK, dtype=torch.float16).shape == (0, *BLOCK)


def test_memory_is_unlocked_when_its_tensor_goes_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls to the CUDA runtime, which there is none of here."""
    locked: dict[int, int] = {}
    runtime = SimpleNamespace(
        cudaError=SimpleNamespace(success=0),
        cudaHostRegister=lambda address, size, flags: locked.update({address: size}) or 0,
        cudaHostUnregister=locked.pop,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    tensor = pinned_zeros(3, 5, dtype=torch.float16)
    assert locked == {tensor.data_ptr(): 30}
    assert tensor.tolist() == [[0.0] * 5] * 3
    block = tensor[1]
    del tensor
    gc.collect()
    assert len(locked) == 1, "a part of it is still in use"
    del block
    gc.collect()
    assert locked == {}


def test_memory_that_cannot_be_locked_is_an_error_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(
        cudaError=SimpleNamespace(success=0),
        cudaHostRegister=lambda *_: 2,
        cudaGetErrorString=lambda error: f"error {error}",
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with pytest.raises(ConfigError, match=r"0\.50 GiB .*error 2.*lower num_host_blocks"):
        pinned_zeros(2**29, dtype=torch.uint8)

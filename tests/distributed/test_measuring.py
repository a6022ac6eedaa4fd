"""What ranks measure: stages by themselves, messages between ranks, copies; and that it leaves no trace."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
psutil = pytest.importorskip("psutil")

from fastserve.core.request import SamplingParams  # noqa: E402
from fastserve.kvcache import Direction  # noqa: E402
from fastserve.runtime.executors.ranks import RankGroup  # noqa: E402
from fastserve.runtime.models import SequenceInput  # noqa: E402
from fastserve.runtime.parallel.channel import Message  # noqa: E402
from fastserve.runtime.worker.probe import StageProbe  # noqa: E402
from support.processes import wait_until_stopped  # noqa: E402
from support.ranks import rank_group  # noqa: E402
from support.tokens import save_model  # noqa: E402

SHAPES = [(1, 3), (2, 2)]
"""Tensor by pipeline parallel."""
PROMPTS = [SequenceInput([5, 6, 7, 8], 0, [0]), SequenceInput([9, 10], 0, [1])]
GREEDY = [SamplingParams()] * 2


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"tp{shape[0]}-pp{shape[1]}")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankGroup]:
    model = tmp_path_factory.mktemp("opt")
    save_model("opt", model, num_layers=4)
    with rank_group(model, *request.param, num_gpu_blocks=40, num_host_blocks=20, timeout_s=60.0) as group:
        yield group


def test_each_stage_is_timed_by_itself_and_then_works_with_the_others_again(ranks: RankGroup) -> None:
    before = ranks.execute(PROMPTS, GREEDY)
    for _ in range(3):
        seconds = ranks.probe(PROMPTS, GREEDY)
        assert len(seconds) == ranks.config.parallel.pipeline_parallel_size
        assert all(0 < each < 10 for each in seconds)
    assert ranks.execute(PROMPTS, GREEDY) == before


def test_the_rank_with_the_largest_part_says_how_many_blocks_a_swap_space_holds(tmp_path: Path) -> None:
    save_model("opt", tmp_path, num_layers=4)
    space: dict[str, Any] = {"num_host_blocks": None, "swap_space_gib_per_gpu": 2**-10}
    with rank_group(tmp_path, 1, 2, stage_layers=(1, 3), num_gpu_blocks=40, timeout_s=60.0, **space) as group:
        part = group.block_size * group.model_config.kv_bytes_per_token("float32") * 3 // 4
        assert group.num_host_blocks == 2**20 // part > 0


def test_the_channel_is_what_the_slowest_stage_leaves(ranks: RankGroup) -> None:
    times = StageProbe(ranks).stage_times([12], [20, 30])
    assert len(times.stages) == ranks.config.parallel.pipeline_parallel_size
    assert 0 < times.channel_s < 10


def test_messages_between_ranks_are_timed_by_size(ranks: RankGroup) -> None:
    sizes = [256, 1 << 24]
    for times in (ranks.send_times(sizes, 3), ranks.all_reduce_times(sizes, 3)):
        assert [size for size, _ in times] == sizes
    assert ranks.send_times(sizes, 3)[0][1] > 0
    if ranks.config.parallel.tensor_parallel_size > 1:
        small, large = ranks.all_reduce_times(sizes, 3)
        assert 0 < small[1] < large[1]


def test_copies_are_timed_until_the_last_rank_has_ended(ranks: RankGroup) -> None:
    for direction in Direction:
        assert 0 < ranks.copy_time(direction, [3, 1, 7]) < 10


def test_frozen_ranks_stand_still_and_then_go_on(ranks: RankGroup) -> None:
    before = ranks.execute(PROMPTS, GREEDY)
    workers = [child for child in psutil.Process().children() if "fastserve.worker" in child.cmdline()]
    assert len(workers) == ranks.world_size
    ranks.run(PROMPTS, GREEDY)
    messages: list[Message] = []
    with ranks.frozen():
        for _ in range(10):  # What was on its way.
            messages += ranks.poll(0.05)
        wait_until_stopped(workers)
        assert not ranks.poll(0.3)
    while not (tokens := [message.numbers[1:] for message in messages if message.kind == "tokens"]):
        messages += ranks.poll(5.0)
    ranks.idle()
    assert tokens == [before]

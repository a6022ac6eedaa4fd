"""Decode batches with their inputs in place: on a CPU the same steps run as they are, on a GPU as CUDA graphs."""

import math
import random
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fastserve.core.errors import ConfigError  # noqa: E402
from fastserve.core.presets import preset  # noqa: E402
from fastserve.core.request import SamplingParams  # noqa: E402
from fastserve.runtime.models import SequenceInput  # noqa: E402
from fastserve.runtime.models.layers import Linear  # noqa: E402
from fastserve.runtime.models.linear_tuning import tune_linears  # noqa: E402
from fastserve.runtime.worker import Worker  # noqa: E402
from fastserve.runtime.worker.decode_runner import DecodeRows, graph_sizes  # noqa: E402
from fastserve.runtime.worker.extras import LogitChanges, RowExtras  # noqa: E402
from support.devices import TRITON_DEVICES  # noqa: E402

SPARE, MAX_ROWS, MAX_BLOCKS, BLOCK_SIZE = 99, 6, 5, 4
GREEDY = SamplingParams()


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 16, 64, 100])
def test_every_batch_has_a_graph_that_is_not_much_larger(most: int) -> None:
    sizes = graph_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for batch in range(1, most + 1):
        size = next(size for size in sizes if size >= batch)
        assert size - batch < 8
        assert size <= 2 * batch or size <= 4


table = st.lists(st.integers(0, 98), min_size=1, max_size=MAX_BLOCKS)
batch = st.lists(st.tuples(st.integers(0, 500), table, st.integers(0, BLOCK_SIZE - 1)), min_size=1, max_size=MAX_ROWS)


@settings(max_examples=200)
@given(
    steps=st.lists(st.tuples(batch, st.sampled_from(["afresh", "prepared", "prepared in vain", "grown"])), max_size=8)
)
def test_rows_hold_the_batch_whatever_was_there_before(steps: list) -> None:
    rows = DecodeRows(MAX_ROWS, MAX_BLOCKS, SPARE)
    for drawn, how in steps:
        sequences = [
            SequenceInput([0], (len(blocks) - 1) * BLOCK_SIZE + offset, list(blocks)) for _, blocks, offset in drawn
        ]
        if how == "prepared in vain":
            rows.prepare([SequenceInput([0], 3, [1, 2])])
        elif how != "afresh":
            rows.prepare(sequences)
        for (token, _, _), sequence in zip(drawn, sequences, strict=True):
            sequence.token_ids[0] = token
            if how == "grown" and len(sequence.block_table) < MAX_BLOCKS:
                sequence.block_table.append(token % 99)
        rows.write(sequences, MAX_ROWS)
        for row, sequence in enumerate(sequences):
            used = len(sequence.block_table)
            assert rows.array[row, :2].tolist() == [sequence.token_ids[0], sequence.start]
            assert rows.array[row, 2 : 2 + used].tolist() == sequence.block_table
        for row in range(len(sequences), MAX_ROWS):
            assert rows.array[row, :3].tolist() == [0, 0, SPARE]


def a_worker(name: str, device: str, **options: object) -> Worker:
    model = replace(preset(name), vocab_size=500)  # The interpreter is slow.
    return Worker(
        model, num_gpu_blocks=20, num_host_blocks=0, block_size=BLOCK_SIZE, device=device, max_model_len=40, **options
    )


@pytest.fixture
def triton_worker(monkeypatch: pytest.MonkeyPatch, device: str):
    """A worker with Triton's kernels, interpreted where there is no GPU."""

    def make(name: str, **options: object) -> Worker:
        with monkeypatch.context() as patch:
            patch.setenv("FASTSERVE_KERNELS", "triton")
            return a_worker(name, device, **options)

    return make


@TRITON_DEVICES
@pytest.mark.parametrize("name", ["opt-tiny", "llama-tiny"])
def test_a_decode_in_place_is_a_decode(triton_worker, name: str, device: str) -> None:
    """Prompts, then some iterations of changing batches, in place and not, give the same tokens and the same cache."""
    rng = random.Random(5)
    workers = [triton_worker(name, max_batch_size=3), triton_worker(name)]
    blocks = list(range(20))
    rng.shuffle(blocks)
    prompts = [[rng.randrange(4, 500) for _ in range(length)] for length in (3, 9, 16)]
    tables = [[blocks.pop() for _ in range(6)] for _ in prompts]
    last = []
    for prompt, table in zip(prompts, tables, strict=True):
        first = [worker.execute([SequenceInput(prompt, 0, table)], [GREEDY])[0] for worker in workers]
        assert first[0] == first[1]
        last.append(first[0])
    starts = [len(prompt) for prompt in prompts]
    for members in ((0, 1, 2), (2, 0), (1,), (2, 1, 0), (2, 1, 0)):
        sequences = [SequenceInput([last[i]], starts[i], tables[i]) for i in members]
        workers[0].prepare(sequences)
        tokens = [worker.execute(sequences, [GREEDY] * len(members)) for worker in workers]
        assert tokens[0] == tokens[1]
        for i, token in zip(members, tokens[0], strict=True):
            last[i], starts[i] = token, starts[i] + 1
    torch.testing.assert_close(workers[0].gpu_cache, workers[1].gpu_cache, rtol=1e-4, atol=1e-5)
    assert workers[0].gpu_cache.shape[0] == 20, "the spare block is nobody's"


@TRITON_DEVICES
def test_drawn_tokens_are_those_of_any_other_batch(triton_worker, device: str) -> None:
    """Some rows greedy, some drawn; each as if it were alone."""
    workers = [triton_worker("opt-tiny", max_batch_size=4), triton_worker("opt-tiny")]
    params = [GREEDY, SamplingParams(temperature=0.8, seed=3), SamplingParams(temperature=1.2, top_p=0.9, seed=4)]
    sequences = [SequenceInput([11 + i], 0, [i]) for i in range(3)]
    assert workers[0].execute(sequences, params) == workers[1].execute(sequences, params)


@TRITON_DEVICES
def test_changed_logits_and_scores_are_those_of_any_other_batch(triton_worker, device: str) -> None:
    workers = [triton_worker("opt-tiny", max_batch_size=4), triton_worker("opt-tiny")]
    params = [GREEDY, GREEDY, SamplingParams(temperature=0.8, seed=3), GREEDY]
    sequences = [SequenceInput([11 + i], 0, [i]) for i in range(4)]
    plain = workers[1].execute(sequences, params)
    extras = {
        0: RowExtras(LogitChanges(forbidden=(plain[0],)), 2),
        2: RowExtras(LogitChanges(allowed=(3, 4), counts={3: 2}, presence_penalty=1.0)),
        3: RowExtras(None, 0),
    }
    in_place, other = (worker.launch(sequences, params, extras)() for worker in workers)
    assert in_place.tokens == other.tokens
    assert in_place.tokens[0] != plain[0]
    assert in_place.tokens[1] == plain[1]
    assert in_place.tokens[2] in (3, 4)
    assert in_place.tokens[3] == plain[3]
    for computed in (in_place, other):
        assert computed.scores is not None
        assert computed.scores.keys() == {0, 3}
        first, last = computed.scores[0].token, computed.scores[3].token
        assert first is not None
        assert last is not None
        assert (first.token_id, first.rank, [token for token, _ in first.top]) == (
            in_place.tokens[0],
            2,
            [plain[0], in_place.tokens[0]],
        )
        assert (last.token_id, last.rank, last.top) == (plain[3], 1, [])


@TRITON_DEVICES
def test_what_does_not_fit_in_place_runs_all_the_same(triton_worker, device: str) -> None:
    """A context beyond the bound, and a batch beyond the largest."""
    workers = [triton_worker("opt-tiny", max_batch_size=2), triton_worker("opt-tiny")]
    long = [SequenceInput([7], 60, list(range(16)))]
    many = [SequenceInput([7], 0, [i]) for i in range(3)]
    for sequences in (long, many):
        tokens = [worker.execute(sequences, [GREEDY] * len(sequences)) for worker in workers]
        assert tokens[0] == tokens[1]


@TRITON_DEVICES
@pytest.mark.parametrize("setting", ["measured", "library"])
def test_linear_layers_take_the_fastest_kernel(monkeypatch: pytest.MonkeyPatch, device: str, setting: str) -> None:
    """And compute the same with any; in float32, which ours do not do, the library's stay."""
    monkeypatch.setenv("FASTSERVE_LINEARS", setting)
    monkeypatch.setattr(Linear, "pack", lambda _: None)
    for dtype in ("bfloat16", "float32"):
        worker = a_worker("opt-tiny", device, dtype=dtype)
        linears = [module for module in worker.model.modules() if isinstance(module, Linear)]
        choices = tune_linears(worker.model, [1, 2, 20])
        if setting == "library" or dtype == "float32":
            assert choices == []
            assert not any(linear.few_rows for linear in linears)
            continue
        assert {(choice.num_columns, choice.num_inner, choice.rows) for choice in choices} == {
            (linear.weight.shape[0], linear.weight.shape[1], rows) for linear in linears for rows in (2, 20)
        }
        assert all(choice.chosen == min(choice.seconds, key=choice.seconds.get) for choice in choices)
        assert all(math.isfinite(seconds) for choice in choices for seconds in choice.seconds.values())
        for linear in linears:
            for rows in (1, 2, 20):
                x = torch.randn(rows, linear.weight.shape[1], device=linear.weight.device).bfloat16()
                expected = torch.nn.functional.linear(x.double(), linear.weight.double())
                if linear.bias is not None:
                    expected += linear.bias.double()
                if linear.relu:
                    expected = expected.relu()
                error = (linear(x).double() - expected).norm() / expected.norm()
                assert error.item() < 1e-2


def test_a_setting_nobody_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSERVE_LINEARS", "quickest")
    with pytest.raises(ConfigError, match="quickest"):
        tune_linears(a_worker("opt-tiny", "cpu").model, [1])

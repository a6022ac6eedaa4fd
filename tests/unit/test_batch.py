"""The flat batch: its order, its tensors, and what it refuses."""

import pytest

pytest.importorskip("torch")

from fastserve.runtime.models import ForwardBatch, SequenceInput


def test_batch_puts_decodes_first_and_gives_results_back_in_order() -> None:
    batch = ForwardBatch.build(
        [SequenceInput([1, 2], 4, [9, 5]), SequenceInput([3], 6, [2, 1]), SequenceInput([4, 5, 6], 0, [7])], 4, "cpu"
    )
    attention = batch.attention
    assert batch.order == [1, 0, 2]
    assert (attention.num_decodes, attention.max_query_len) == (1, 3)
    assert batch.token_ids.tolist() == [3, 1, 2, 4, 5, 6]
    assert batch.positions.tolist() == [6, 4, 5, 0, 1, 2]
    assert batch.slot_mapping.tolist() == [6, 20, 21, 28, 29, 30]
    assert attention.query_starts.tolist() == [0, 1, 3, 6]
    assert attention.host_query_lens == [1, 2, 3]
    assert attention.host_context_lens == attention.context_lens.tolist() == [7, 6, 3]
    assert attention.block_tables.tolist() == [[2, 1], [9, 5], [7, 0]]
    last = batch.last_tokens()
    assert last is not None
    assert last.tolist() == [0, 2, 5]
    assert batch.in_callers_order([10, 20, 30]) == [20, 10, 30]


def test_every_token_is_the_last_of_its_request_in_a_batch_of_decodes() -> None:
    batch = ForwardBatch.build([SequenceInput([1], 4, [9, 5]), SequenceInput([3], 0, [2])], 4, "cpu")
    assert batch.last_tokens() is None


@pytest.mark.parametrize("sequence", [SequenceInput([], 0, [1]), SequenceInput([1], 4, [3])], ids=["empty", "no block"])
def test_batch_refuses_what_it_cannot_lay_out(sequence: SequenceInput) -> None:
    with pytest.raises(ValueError, match="needs at least one token and"):
        ForwardBatch.build([sequence], 4, "cpu")

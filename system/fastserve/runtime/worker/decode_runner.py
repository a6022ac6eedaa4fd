"""DecodeRunner: run decode batches with inputs at fixed addresses, so that a GPU replays them as CUDA graphs.

A decode step of a large model is hundreds of kernels of a few microseconds, which the host launches more slowly than
the GPU runs them. A CUDA graph launches them at once, but only for one batch size, and at the addresses of its capture.
So there is a graph for each of some sizes. A batch is padded to the next size with rows that use a spare cache block.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastserve.runtime.kernels import AttentionMetadata, Kernels
from fastserve.runtime.kernels.cuda_graph import capture
from fastserve.runtime.models import DecoderModel, ForwardBatch, SequenceInput
from fastserve.runtime.parallel.groups import DEVICE, Ranks
from fastserve.runtime.worker.extras import Extras
from fastserve.runtime.worker.runner import Computed
from fastserve.runtime.worker.sampler import SamplingLike, SharedVocabulary, best_tokens, needs_logits, sample
from fastserve.runtime.worker.scoring import Scorer


def graph_sizes(max_batch_size: int) -> list[int]:
    """Batch sizes with a graph: dense enough to pad little, few enough to capture in seconds."""
    sizes = {size for size in (1, 2, 4, *range(8, max_batch_size, 8)) if size < max_batch_size}
    return sorted({*sizes, max_batch_size})


class DecodeRows:
    """The rows of a decode batch on the host: a token, its position, and the request's block table.

    Rows are kept from one iteration to the next, and only changes are written.

    Args:
        max_rows: of a batch.
        max_blocks: of a request.
        spare_block: that padding rows read and write.
    """

    def __init__(self, max_rows: int, max_blocks: int, spare_block: int) -> None:
        self.array = np.zeros((max_rows, 2 + max_blocks), dtype=np.int64)
        """`[max_rows, 2 + max_blocks]`"""
        self._spare: list[int] = [spare_block]
        self._tables = [self._spare] * max_rows
        self.array[:, 2] = spare_block
        self._prepared: Sequence[SequenceInput] = ()

    def prepare(self, sequences: Sequence[SequenceInput]) -> None:
        """Write the batch that will probably be next, without its tokens and later blocks."""
        self._prepared = sequences
        self.array[: len(sequences), 1] = [sequence.start for sequence in sequences]
        for row, sequence in enumerate(sequences):
            if self._tables[row] != sequence.block_table:
                self._write_table(row, sequence.block_table)

    def write(self, sequences: Sequence[SequenceInput], num_rows: int) -> None:
        """Write a batch, padded to `num_rows`. It is fast if this very list was prepared."""
        if sequences is not self._prepared:
            self.prepare(sequences)
        else:  # Since then, block tables can only have grown.
            for row, sequence in enumerate(sequences):
                if len(self._tables[row]) != len(sequence.block_table):
                    self._write_table(row, sequence.block_table)
        self._prepared = ()
        count = len(sequences)
        self.array[:count, 0] = [sequence.token_ids[0] for sequence in sequences]
        self.array[count:num_rows, :2] = 0
        for row in range(count, num_rows):
            if self._tables[row] is not self._spare:
                self._write_table(row, self._spare)
                self._tables[row] = self._spare

    def _write_table(self, row: int, table: list[int]) -> None:
        self.array[row, 2 : 2 + len(table)] = table
        self._tables[row] = table.copy()


class DecodeRunner:
    """Runs decode batches of a model, one at a time: wait for the tokens of a batch before launching the next.

    Args:
        model: the model, or a part of it. On a CPU nothing is captured, and each step runs eagerly.
        kernels: a set that does not loop on the host.
        cache: the pool on the device; its last block is the spare block.
        block_size: tokens per block.
        max_batch_size: most requests of a batch.
        max_model_len: most tokens of a request.
        ranks: how this rank reaches the others; a graph does not include what stages exchange.
        vocabulary: how the shards of a stage agree on tokens; None: there is one shard.
    """

    def __init__(
        self,
        model: DecoderModel,
        kernels: Kernels,
        cache: Tensor,
        block_size: int,
        max_batch_size: int,
        max_model_len: int,
        ranks: Ranks,
        vocabulary: SharedVocabulary | None,
    ) -> None:
        self.sizes = graph_sizes(max_batch_size)
        self._model, self._kernels, self._cache, self._block_size = model, kernels, cache, block_size
        self._place, self._ranks, self._vocabulary = model.place, ranks, vocabulary
        self._on_gpu = cache.is_cuda
        self._max_blocks = -(-max_model_len // block_size)
        self._rows = DecodeRows(max_batch_size, self._max_blocks, cache.shape[0] - 1)
        # Page-locked, for kernels to read and write: a copy, however small, would queue behind swaps.
        self._packed = torch.zeros(max_batch_size, 2 + self._max_blocks, dtype=torch.int64, pin_memory=self._on_gpu)
        self._packed_array = self._packed.numpy()
        self._tokens = torch.zeros(max_batch_size, dtype=torch.int64, pin_memory=self._on_gpu)

        def on_device(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=cache.device)

        self._token_ids, self._positions, self._slot_mapping = (on_device(max_batch_size) for _ in range(3))
        self._context_lens = on_device(max_batch_size)
        self._block_tables = on_device(max_batch_size, self._max_blocks)
        self._query_starts = torch.arange(max_batch_size + 1, device=cache.device)
        hidden = (max_batch_size, model.config.hidden_size)
        self._received = (
            None if self._place.is_first_stage else torch.zeros(hidden, dtype=cache.dtype, device=cache.device)
        )
        """Activations from the stage before."""
        self._packed_array[:] = self._rows.array
        self._steps: dict[int, Callable[[], Tensor]] = {}
        self._pool: Any = None
        for size in reversed(self.sizes):  # The largest first: the others reuse its memory.
            self._steps[size] = self._captured(size) if self._on_gpu else self._step_of(size)
        self._done = torch.cuda.Event() if self._on_gpu else None

    def takes(self, sequences: Sequence[SequenceInput]) -> bool:
        """Whether this is a decode batch that fits the buffers."""
        return len(sequences) <= self.sizes[-1] and all(
            len(sequence.token_ids) == 1 and len(sequence.block_table) <= self._max_blocks for sequence in sequences
        )

    def prepare(self, sequences: Sequence[SequenceInput]) -> None:
        """Write the inputs for a launch of this very list, without the tokens."""
        self._rows.prepare(sequences)

    def launch(
        self, sequences: Sequence[SequenceInput], sampling: Sequence[SamplingLike], extras: Extras | None = None
    ) -> Callable[[], Computed]:
        """Start a batch that `takes` accepts; its `extras` must score no prompts.

        Returns a function that waits for the batch and returns its tokens, which are empty unless this is the last
        stage.
        """
        count = len(sequences)
        size = self.sizes[bisect_left(self.sizes, count)]
        self._rows.write(sequences, size)
        self._packed_array[:size] = self._rows.array[:size]
        neighbours = self._ranks.neighbours
        scorer: Scorer | None = None
        if self._received is not None:
            assert neighbours is not None
            neighbours.receive(self._received[:count])
        result = self._steps[size]()[:count]
        if not self._place.is_last_stage:
            assert neighbours is not None
            # The next replay overwrites it, perhaps before the next stage has received it.
            neighbours.send(result.clone() if self._on_gpu else result)
        elif needs_logits(sampling, extras):  # The step itself stores the greedy tokens.
            positions = [sequence.start + 1 for sequence in sequences]
            drawn = sample(result, sampling, positions, self._vocabulary, extras)
            self._kernels.exchange(drawn, self._tokens)
            if extras:
                scorer = Scorer(extras, self._vocabulary)
                scorer.score_new(result, drawn, range(count))
        if self._done is not None:
            self._done.record()

        def wait() -> Computed:
            if self._done is not None:
                with self._ranks.progress.waiting(DEVICE):
                    self._done.synchronize()
            tokens = self._tokens[:count].tolist() if self._place.is_last_stage else []
            return Computed(tokens, None if scorer is None else scorer.results())

        return wait

    def _step_of(self, size: int) -> Callable[[], Tensor]:
        """A decode step of `size` rows on the buffers; it returns the model's output."""
        token_ids, positions, slot_mapping = self._token_ids[:size], self._positions[:size], self._slot_mapping[:size]
        context_lens, block_tables = self._context_lens[:size], self._block_tables[:size]
        attention = AttentionMetadata(
            num_decodes=size,
            max_query_len=1,
            query_starts=self._query_starts[: size + 1],
            context_lens=context_lens,
            block_tables=block_tables,
            host_query_lens=[],
            host_context_lens=[],
        )
        batch = ForwardBatch(token_ids, positions, slot_mapping, attention, list(range(size)))
        packed = self._packed[:size]
        received = None if self._received is None else self._received[:size]

        def step() -> Tensor:
            self._kernels.load_decodes(
                packed, token_ids, positions, slot_mapping, context_lens, block_tables, self._block_size
            )
            result = self._model(batch, self._cache, received)
            if self._place.is_last_stage:
                self._kernels.exchange(best_tokens(result, self._vocabulary), self._tokens)
            return result

        return step

    def _captured(self, size: int) -> Callable[[], Tensor]:
        """The step of `size` rows as a CUDA graph."""
        graph, result = capture(self._step_of(size), self._pool)
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

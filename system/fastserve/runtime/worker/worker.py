"""Worker: a model or a part of it, with a KV pool on its device and one in host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastserve.core.checks import require_int
from fastserve.core.config import CacheConfig, ModelConfig
from fastserve.core.parallel import Place
from fastserve.runtime.kernels import kernels_for
from fastserve.runtime.models import ForwardBatch, SequenceInput, build_model
from fastserve.runtime.models.linear_tuning import LinearChoice, tune_linears
from fastserve.runtime.parallel.groups import DEVICE, Ranks
from fastserve.runtime.worker.decode_runner import DecodeRunner, graph_sizes
from fastserve.runtime.worker.devices import find_device, tokens_on
from fastserve.runtime.worker.extras import Extras
from fastserve.runtime.worker.memory import pinned_zeros, require_room
from fastserve.runtime.worker.runner import Computed, require_runner
from fastserve.runtime.worker.sampler import SamplingLike, SharedVocabulary, sample
from fastserve.runtime.worker.scoring import Scorer
from fastserve.runtime.worker.sizing import rank_bytes


class Worker:
    """Runs iterations on blocks of `gpu_cache`; other blocks may be copied meanwhile (`runtime.worker.copier`).

    Args:
        model_config: the architecture.
        num_gpu_blocks: blocks of the pool on `device`; with "cpu" it is another pool in host memory.
        num_host_blocks: blocks of the host pool; may be 0.
        block_size: tokens per block.
        device: "cpu", "cuda" or "cuda:N".
        dtype: "float32", "bfloat16" or "float16", of weights and cache.
        seed: of the dummy weights, if `model_dir` is None.
        model_dir: directory in Hugging Face format with the weights.
        max_batch_size: largest decode batch that runs as a CUDA graph, on a GPU; None: no graphs.
        max_model_len: tokens of the longest request in such batches; None: the model's own limit.
        place: the part of the model that this worker holds; None: the whole.
        ranks: how it reaches the other ranks; None: there are none.

    Raises:
        ConfigError: an option out of range, or weights or pools that do not fit the available memory.
        CheckpointError: `model_dir` is incomplete or does not match `model_config`.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        *,
        num_gpu_blocks: int,
        num_host_blocks: int,
        block_size: int,
        device: str = "cpu",
        dtype: str = "float32",
        seed: int = 0,
        model_dir: str | Path | None = None,
        max_batch_size: int | None = None,
        max_model_len: int | None = None,
        place: Place | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        for name, value, least in (
            ("num_gpu_blocks", num_gpu_blocks, 1),
            ("num_host_blocks", num_host_blocks, 0),
            ("block_size", block_size, 1),
        ):
            require_int(name, value, least)
        self.device = find_device(device)
        self.block_size = block_size
        self.place = place = place or Place.whole(model_config)
        self._ranks = ranks or Ranks()
        self._check_room(model_config, num_gpu_blocks, num_host_blocks, dtype)
        torch_dtype: torch.dtype = getattr(torch, dtype)
        source = seed if model_dir is None else model_dir
        self.model = build_model(model_config, torch_dtype, self.device, source, place, self._ranks.group)
        layout = (place.num_layers, 2, block_size, len(place.kv_heads(model_config)), model_config.head_dim)
        self._vocabulary = SharedVocabulary.of(model_config, place, self._ranks.group)
        self._kernels = kernels_for(self.device)
        most_in_place = None if self._kernels.loops_on_host else max_batch_size
        spare_blocks = 0 if most_in_place is None else 1
        self._cache = torch.zeros(num_gpu_blocks + spare_blocks, *layout, dtype=torch_dtype, device=self.device)
        if self.device.type == "cuda":
            self._cache.normal_()  # A GPU computes zeros faster than real caches, and is timed while they are empty.
        self.gpu_cache = self._cache[:num_gpu_blocks]
        # Page-locked, for copies at link speed during the computation.
        host_zeros = pinned_zeros if self.device.type == "cuda" else torch.zeros
        self.host_cache = host_zeros(num_host_blocks, *layout, dtype=torch_dtype)

        self._decodes: DecodeRunner | None = None
        self.linear_choices: list[LinearChoice] = []
        """Measured kernels of the linear layers in decode batches; empty where none were measured."""
        if most_in_place is not None:
            self.linear_choices = tune_linears(self.model, graph_sizes(most_in_place))
            context = min(max_model_len or model_config.max_model_len, model_config.max_model_len)
            self._decodes = DecodeRunner(
                self.model,
                self._kernels,
                self._cache,
                block_size,
                most_in_place,
                context,
                self._ranks,
                self._vocabulary,
            )

    @property
    def model_config(self) -> ModelConfig:
        """Architecture of the whole model, also if this is a part."""
        return self.model.config

    @property
    def num_gpu_blocks(self) -> int:
        """Blocks of the pool on the device."""
        return self.gpu_cache.shape[0]

    @property
    def num_host_blocks(self) -> int:
        """Blocks of the host pool."""
        return self.host_cache.shape[0]

    def _check_room(self, model: ModelConfig, num_gpu_blocks: int, num_host_blocks: int, dtype: str) -> None:
        block_bytes = self.block_size * self.place.kv_bytes_per_token(model, dtype)
        device_bytes = rank_bytes(model, self.place, dtype) + num_gpu_blocks * block_bytes
        host_bytes = num_host_blocks * block_bytes
        per_block = f"of {block_bytes / 2**20:.2f} MiB"
        whose = "" if self.place == Place.whole(model) else f", {self.place},"
        device_part = f"model {model.name}{whose} in {dtype} with {num_gpu_blocks} GPU blocks {per_block}"
        host_part = f"{num_host_blocks} host blocks {per_block}"
        if self.device.type == "cpu":
            require_room(f"{device_part} and {host_part}", device_bytes + host_bytes, self.device)
        else:
            require_room(device_part, device_bytes, self.device)
            require_room(host_part, host_bytes, torch.device("cpu"))

    def require(self, model_config: ModelConfig, cache: CacheConfig, device: str, dtype: str) -> None:
        """Raise ConfigError unless this worker can serve an engine of that model, with a cache of that size."""
        own = (str(self.device), str(self._cache.dtype).removeprefix("torch."))
        require_runner("worker", self, own, model_config, cache, (str(find_device(device)), dtype))

    def execute(self, sequences: Sequence[SequenceInput], sampling: Sequence[SamplingLike]) -> list[int]:
        """Launch an iteration and wait for its tokens."""
        return self.launch(sequences, sampling)().tokens

    @torch.inference_mode()
    def launch(
        self, sequences: Sequence[SequenceInput], sampling: Sequence[SamplingLike], extras: Extras | None = None
    ) -> Callable[[], Computed]:
        """Start an iteration: compute the tokens of `sequences`, store their keys and values, sample each next token.

        Args:
            sequences: the tokens to compute.
            sampling: how to sample the next token of each sequence.
            extras: what sequences need beyond that, by index; None: nothing.

        Returns:
            A function to call before the next launch. It waits for the iteration (a CPU computes only then) and
            returns the next tokens in the order of `sequences`, none if a later stage has them. The token of a chunk
            is meaningless unless the chunk is the prompt's last. Afterwards the blocks may be copied.
        """
        scores_prompts = extras is not None and any(one.prompt is not None for one in extras.values())
        if self._decodes is not None and not scores_prompts and self._decodes.takes(sequences):
            return self._decodes.launch(sequences, sampling, extras)
        if self.device.type == "cpu":
            return partial(self._compute, sequences, sampling, extras)
        batch = ForwardBatch.build(sequences, self.block_size, self.device)
        computed, scorer = self._next_tokens(batch, sampling, extras)
        tokens = None
        if computed is not None:
            tokens = torch.empty(batch.num_requests, dtype=torch.int64, pin_memory=True)
            self._kernels.exchange(computed, tokens)
        done = torch.cuda.Event()
        done.record()

        def wait() -> Computed:
            with self._ranks.progress.waiting(DEVICE):
                done.synchronize()
            return _computed(batch, tokens, scorer)

        return wait

    def prepare(self, sequences: Sequence[SequenceInput]) -> None:
        """Prepare a launch of `sequences` while the device still computes the last one.

        Token ids are not read yet, and block tables may still grow. A launch of this very list is then faster; a
        launch of another list is not affected.
        """
        if self._decodes is not None and self._decodes.takes(sequences):
            self._decodes.prepare(sequences)

    @torch.inference_mode()
    def _compute(
        self, sequences: Sequence[SequenceInput], sampling: Sequence[SamplingLike], extras: Extras | None
    ) -> Computed:
        batch = ForwardBatch.build(sequences, self.block_size, self.device)
        return _computed(batch, *self._next_tokens(batch, sampling, extras))

    def _next_tokens(
        self, batch: ForwardBatch, sampling: Sequence[SamplingLike], extras: Extras | None
    ) -> tuple[Tensor | None, Scorer | None]:
        """The next tokens, `[num_requests]` in the batch's order, and their scorer; None if a later stage has them."""
        neighbours, received = self._ranks.neighbours, None
        if not self.place.is_first_stage:
            assert neighbours is not None
            size = (len(batch.token_ids), self.model.config.hidden_size)
            received = torch.empty(size, dtype=self._cache.dtype, device=self.device)
            neighbours.receive(received)
        if not self.place.is_last_stage:
            assert neighbours is not None
            neighbours.send(self.model(batch, self._cache, received))
            return None, None
        scorer = None if extras is None else Scorer(extras, self._vocabulary)
        before_targets = [] if extras is None else _before_targets(batch, extras)
        if before_targets:
            count, last = batch.num_requests, batch.attention.query_starts[1:] - 1
            keep = torch.cat((last, tokens_on(before_targets, self.device)))
            states = self.model.states(batch, self._cache, received, keep)
            logits = self.model.project(states[:count])
            assert scorer is not None
            scorer.score_prompts(states[count:], self.model.project, batch.order, self.model.config.vocab_size)
        else:
            logits = self.model(batch, self._cache, received)
        by_row = extras and {row: extras[place] for row, place in enumerate(batch.order) if place in extras}
        context_lens = batch.attention.host_context_lens
        tokens = sample(logits, [sampling[i] for i in batch.order], context_lens, self._vocabulary, by_row)
        if scorer is not None:
            scorer.score_new(logits, tokens, batch.order)
        return tokens, scorer


def _computed(batch: ForwardBatch, tokens: Tensor | None, scorer: Scorer | None) -> Computed:
    """The result in the caller's order."""
    in_order = [] if tokens is None else batch.in_callers_order(tokens.tolist())
    return Computed(in_order, None if scorer is None else scorer.results())


def _before_targets(batch: ForwardBatch, extras: Extras) -> list[int]:
    """Indices of the query tokens whose logits score a prompt token, in the batch's order."""
    found: list[int] = []
    start = 0
    for place, query_len in zip(batch.order, batch.attention.host_query_lens, strict=True):
        if place in extras and (prompt := extras[place].prompt) is not None:
            first = start + prompt.first
            found += range(first, first + len(prompt.token_ids))
        start += query_len
    return found

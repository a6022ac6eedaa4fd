"""DecoderModel: what all families share: embed tokens, run the layers, project to the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastserve.runtime.models.batch import ForwardBatch
from fastserve.runtime.models.layers import Attention, Linear, Norm
from fastserve.runtime.models.part import Part, Weight

Rotary = tuple[Tensor, Tensor]


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residuals. A family adds `mlp` and the names in its checkpoint."""

    attention: Attention
    attention_norm: Norm
    mlp_norm: Norm

    def mlp(self, x: Tensor) -> Tensor:
        """Map `[rows, hidden_size]` to the same shape."""
        raise NotImplementedError

    def weights(self, prefix: str) -> Iterator[Weight]:
        """The checkpoint's tensors under `prefix`."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        cache: Tensor,
        layer: int,
        batch: ForwardBatch,
        rotary: Rotary | None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer and store all keys and values.

        Returns what the layer adds to the residual stream, and the stream without it, each `[num_tokens, hidden_size]`,
        or only the rows `keep`. The next norm adds the two at no extra cost. `x` and `residual` are the same two from
        the layer before (the first layer has only `x`); `layer` is its index in the cache.
        """
        x, residual = self.attention_norm(x, residual)
        x = self.attention(x, cache, layer, batch.slot_mapping, batch.attention, rotary, keep)
        x, residual = self.mlp_norm(x, residual if keep is None else residual[keep])
        return self.mlp(x), residual


class DecoderModel(nn.Module):
    """A decoder-only language model on the paged cache, without autograd, or the part of one that a rank holds.

    The first stage has the embedding; the last has the final norm and the output projection. A projection tied to an
    embedding in another stage is a copy.
    """

    layer_prefix: ClassVar[str]
    """Name of layer `{}` in a checkpoint, with the trailing dot."""
    embedding_name: ClassVar[str]
    final_norm_name: ClassVar[str]
    layer_class: ClassVar[type[DecoderLayer]]
    rms: ClassVar[bool]
    """Whether the final norm is an RMS norm."""

    embedding: Tensor | None
    """`[tokens of the shard, hidden_size]`"""
    final_norm: Norm | None
    lm_head: Linear | None

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.config, self.place, self.group = part.config, part.place, part.group
        self.dtype, self.device = part.dtype, part.device
        self.vocabulary = part.vocabulary
        first, last = self.place.is_first_stage, self.place.is_last_stage
        size = (len(self.vocabulary.held), self.config.hidden_size)
        self.register_buffer("embedding", part.empty(*size) if first else None)
        self.layers = nn.ModuleList(self.layer_class(part) for _ in range(self.place.num_layers))
        self.final_norm = Norm(part, rms=self.rms) if last else None
        self.lm_head = None
        if last:
            tied = self.config.tie_word_embeddings
            rows = ((self.embedding_name.removesuffix(".weight") if tied else "lm_head", self.vocabulary),)
            if tied and first:
                part = replace(part, device=torch.device("meta"))
            self.lm_head = Linear(part, part.hidden, rows, bias=False)
            if tied and first:
                self.lm_head.weight = self.embedding

    def embed(self, batch: ForwardBatch) -> Tensor:
        """Input of the first layer: `[num_tokens, hidden_size]`."""
        assert self.embedding is not None
        if self.vocabulary.is_whole:
            return self.embedding[batch.token_ids]
        rows = batch.token_ids - self.vocabulary.held.start
        held = rows.clamp(0, len(self.vocabulary.held) - 1)
        x = self.embedding[held].masked_fill_((held != rows).unsqueeze(1), 0)
        return self.group.all_reduce(x)

    def rotary(self, positions: Tensor) -> Rotary | None:
        """Cosines and sines, `[num_tokens, 1, head_dim]`, in families with rotary positions; None in others."""
        return None

    def weights(self) -> Iterator[Weight]:
        """The checkpoint's tensors that this part takes, under Hugging Face's names, with their targets."""
        if self.embedding is not None:
            yield Weight(self.embedding_name, self.embedding, 0, self.vocabulary)
        for index, layer in enumerate(self.layers, self.place.first_layer):
            assert isinstance(layer, DecoderLayer)
            yield from layer.weights(self.layer_prefix.format(index))
        if self.lm_head is not None and self.lm_head.weight is not self.embedding:
            yield from self.lm_head.weights("")
        if self.final_norm is not None:
            yield from self.final_norm.weights(self.final_norm_name)

    def pack(self) -> None:
        """Prepare the loaded weights for speed (`Linear.pack`)."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: Tensor, x: Tensor | None = None) -> Tensor:
        """Run a batch, and store its keys and values in `cache`.

        Args:
            batch: the query tokens.
            cache: the pool on the device; its layer 0 is the stage's first layer.
            x: output of the stage before, `[num_tokens, hidden_size]`; None on the first stage.

        Returns:
            On the last stage the logits of each request's last query token, `[num_requests, tokens of the shard]`; on
            others the input of the next stage.
        """
        states = self.states(batch, cache, x, batch.last_tokens())
        return states if self.lm_head is None else self.lm_head(states)

    @torch.inference_mode()
    def states(self, batch: ForwardBatch, cache: Tensor, x: Tensor | None, keep: Tensor | None) -> Tensor:
        """Run a batch up to the projection; returns the states of the query tokens `keep`, `[len(keep), hidden_size]`.

        `keep` holds indices of query tokens; None: all. A stage before the last returns all, for the next stage.
        """
        x, residual = self.embed(batch) if x is None else x, None
        rotary = self.rotary(batch.positions)
        last = len(self.layers) - 1 if self.place.is_last_stage else None
        for index, layer in enumerate(self.layers):
            # After the last attention only the tokens in `keep` are needed.
            x, residual = layer(x, residual, cache, index, batch, rotary, keep if index == last else None)
        if self.final_norm is None:
            assert residual is not None
            return x + residual
        return self.final_norm(x, residual)[0]

    @torch.inference_mode()
    def project(self, states: Tensor) -> Tensor:
        """Logits of `states`, `[rows, tokens of the shard]`, on the last stage."""
        assert self.lm_head is not None
        return self.lm_head(states)

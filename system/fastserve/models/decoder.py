"""What decoder families have in common: embed, run the layers, project each request's last token to the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastserve.config import ModelConfig
from fastserve.models.batch import ForwardBatch
from fastserve.models.layers import Attention, Linear, Norm, Weight

Rotary = tuple[Tensor, Tensor]


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residuals. A family adds `mlp` and the names in its checkpoint."""

    attention: Attention
    attention_norm: Norm
    mlp_norm: Norm

    def mlp(self, x: Tensor) -> Tensor:
        """`[rows, hidden_size]` to the same."""
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
        """What the layer adds to the residual stream, and the stream without it; stores all keys and values.

        Both are `[num_tokens, hidden_size]`, as are `x` and `residual`, the same two of the layer before (the first
        has only `x`); with `keep` its rows alone. Apart, since adding costs nothing beside the norm that follows.
        """
        x, residual = self.attention_norm(x, residual)
        x = self.attention(x, cache, layer, batch.slot_mapping, batch.attention, rotary, keep)
        x, residual = self.mlp_norm(x, residual if keep is None else residual[keep])
        return self.mlp(x), residual


class DecoderModel(nn.Module):
    """A decoder-only language model over the paged cache, without autograd."""

    layer_prefix: ClassVar[str]
    """Name of layer `{}` in a checkpoint, with the trailing dot."""
    embedding_name: ClassVar[str]
    layer_class: ClassVar[type[DecoderLayer]]

    embedding: Tensor
    final_norm: Norm

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = config
        size = (config.vocab_size, config.hidden_size)
        self.register_buffer("embedding", torch.empty(size, dtype=dtype, device=device))
        self.layers = nn.ModuleList(self.layer_class(config, dtype, device) for _ in range(config.num_layers))
        parts = (("lm_head", config.vocab_size),)
        head_device = torch.device("meta") if config.tie_word_embeddings else device
        self.lm_head = Linear(config.hidden_size, parts, bias=False, dtype=dtype, device=head_device)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embedding

    def embed(self, batch: ForwardBatch) -> Tensor:
        """`[num_tokens, hidden_size]`: what enters the first layer."""
        return self.embedding[batch.token_ids]

    def rotary(self, positions: Tensor) -> Rotary | None:
        """Cosines and sines `[num_tokens, 1, head_dim]` for a family with rotary positions."""
        return None

    def weights(self) -> Iterator[Weight]:
        """Every tensor a checkpoint must have, under Hugging Face's name, with the place it fills."""
        yield Weight(self.embedding_name, self.embedding)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            yield from layer.weights(self.layer_prefix.format(index))
        if not self.config.tie_word_embeddings:
            yield from self.lm_head.weights("")

    def pack(self) -> None:
        """Prepare the loaded weights for speed (`Linear.pack`)."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: Tensor) -> Tensor:
        """Logits `[num_requests, vocab_size]` of each request's last query token; stores keys and values in `cache`."""
        x, residual = self.embed(batch), None
        rotary = self.rotary(batch.positions)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            # Beyond the last layer's attention only the last token of a request matters.
            keep = batch.last_tokens() if index == last else None
            x, residual = layer(x, residual, cache, index, batch, rotary, keep)
        x, _ = self.final_norm(x, residual)
        return self.lm_head(x)

"""OPT: learned positions, layer norm, ReLU (Zhang et al. 2022), in its pre-norm form."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastserve.config import ModelConfig
from fastserve.models.batch import ForwardBatch
from fastserve.models.decoder import DecoderLayer, DecoderModel
from fastserve.models.layers import Attention, Linear, Norm, Weight

_POSITION_OFFSET = 2
"""The checkpoints' position table begins with two rows for padding."""


class OPTLayer(DecoderLayer):
    """One layer of OPT."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.attention = Attention(config, out_name="out_proj", bias=True, dtype=dtype, device=device)
        self.attention_norm = Norm(hidden, config.norm_eps, rms=False, dtype=dtype, device=device)
        self.mlp_norm = Norm(hidden, config.norm_eps, rms=False, dtype=dtype, device=device)
        self.up = Linear(hidden, (("fc1", inner),), bias=True, relu=True, dtype=dtype, device=device)
        self.down = Linear(inner, (("fc2", hidden),), bias=True, dtype=dtype, device=device)

    def mlp(self, x: Tensor) -> Tensor:
        """`[rows, hidden_size]` to the same."""
        return self.down(self.up(x))

    def weights(self, prefix: str) -> Iterator[Weight]:
        """The checkpoint's tensors under `prefix`."""
        yield from self.attention.weights(f"{prefix}self_attn.")
        yield from self.attention_norm.weights(f"{prefix}self_attn_layer_norm")
        yield from self.mlp_norm.weights(f"{prefix}final_layer_norm")
        yield from self.up.weights(prefix)
        yield from self.down.weights(prefix)


class OPTModel(DecoderModel):
    """OPTForCausalLM."""

    layer_prefix = "model.decoder.layers.{}."
    embedding_name = "model.decoder.embed_tokens.weight"
    layer_class = OPTLayer
    position_embedding: Tensor

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, dtype, device)
        size = (config.max_model_len + _POSITION_OFFSET, config.hidden_size)
        self.register_buffer("position_embedding", torch.empty(size, dtype=dtype, device=device))
        self.final_norm = Norm(config.hidden_size, config.norm_eps, rms=False, dtype=dtype, device=device)

    def embed(self, batch: ForwardBatch) -> Tensor:
        """`[num_tokens, hidden_size]`: token plus position."""
        return super().embed(batch).add_(self.position_embedding[batch.positions + _POSITION_OFFSET])

    def weights(self) -> Iterator[Weight]:
        """Every tensor a checkpoint must have."""
        yield from super().weights()
        yield Weight("model.decoder.embed_positions.weight", self.position_embedding)
        yield from self.final_norm.weights("model.decoder.final_layer_norm")

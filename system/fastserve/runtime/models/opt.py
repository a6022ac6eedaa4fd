"""OPT: learned positions, layer norm, ReLU (Zhang et al. 2022), in its pre-norm form."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fastserve.runtime.models.batch import ForwardBatch
from fastserve.runtime.models.decoder import DecoderLayer, DecoderModel
from fastserve.runtime.models.layers import Attention, Linear, Norm
from fastserve.runtime.models.part import Part, Weight

_POSITION_OFFSET = 2
"""Position tables in checkpoints begin with two padding rows."""


class OPTLayer(DecoderLayer):
    """One layer of OPT."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.attention = Attention(part, out_name="out_proj", bias=True)
        self.attention_norm = Norm(part, rms=False)
        self.mlp_norm = Norm(part, rms=False)
        self.up = Linear(part, part.hidden, (("fc1", part.inner),), bias=True, relu=True)
        self.down = Linear(part, part.inner, (("fc2", part.hidden),), bias=True)

    def mlp(self, x: Tensor) -> Tensor:
        """Map `[rows, hidden_size]` to the same shape."""
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
    final_norm_name = "model.decoder.final_layer_norm"
    layer_class = OPTLayer
    rms = False
    position_embedding: Tensor | None

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        size = (self.config.max_model_len + _POSITION_OFFSET, self.config.hidden_size)
        self.register_buffer("position_embedding", part.empty(*size) if self.place.is_first_stage else None)

    def embed(self, batch: ForwardBatch) -> Tensor:
        """Token plus position embedding: `[num_tokens, hidden_size]`."""
        assert self.position_embedding is not None
        return super().embed(batch).add_(self.position_embedding[batch.positions + _POSITION_OFFSET])

    def weights(self) -> Iterator[Weight]:
        """The checkpoint's tensors that this part takes."""
        yield from super().weights()
        if self.position_embedding is not None:
            yield Weight("model.decoder.embed_positions.weight", self.position_embedding)

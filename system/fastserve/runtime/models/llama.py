"""Llama 2 and 3: RMS norm, rotary positions, grouped-query attention, SiLU-gated MLP."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastserve.runtime.models.decoder import DecoderLayer, DecoderModel, Rotary
from fastserve.runtime.models.layers import Attention, Linear, Norm
from fastserve.runtime.models.part import Part, Weight


class LlamaLayer(DecoderLayer):
    """One layer of Llama."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.kernels = part.kernels
        self.attention = Attention(part, out_name="o_proj", bias=False)
        self.attention_norm = Norm(part, rms=True)
        self.mlp_norm = Norm(part, rms=True)
        self.gate_up = Linear(part, part.hidden, (("gate_proj", part.inner), ("up_proj", part.inner)), bias=False)
        self.down = Linear(part, part.inner, (("down_proj", part.hidden),), bias=False)

    def mlp(self, x: Tensor) -> Tensor:
        """Map `[rows, hidden_size]` to the same shape."""
        return self.down(self.kernels.silu_mul(self.gate_up(x)))

    def weights(self, prefix: str) -> Iterator[Weight]:
        """The checkpoint's tensors under `prefix`."""
        yield from self.attention.weights(f"{prefix}self_attn.")
        yield from self.attention_norm.weights(f"{prefix}input_layernorm")
        yield from self.mlp_norm.weights(f"{prefix}post_attention_layernorm")
        yield from self.gate_up.weights(f"{prefix}mlp.")
        yield from self.down.weights(f"{prefix}mlp.")


class LlamaModel(DecoderModel):
    """LlamaForCausalLM."""

    layer_prefix = "model.layers.{}."
    embedding_name = "model.embed_tokens.weight"
    final_norm_name = "model.norm"
    layer_class = LlamaLayer
    rms = True

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        config = part.config
        frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self.frequencies = frequencies.to(part.device)

    def rotary(self, positions: Tensor) -> Rotary:
        """Cosines and signed sines `[num_tokens, 1, head_dim]`, computed in float32."""
        angles = positions.unsqueeze(1) * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        dtype = self.dtype
        return torch.cat((cos, cos), 1).unsqueeze(1).to(dtype), torch.cat((-sin, sin), 1).unsqueeze(1).to(dtype)


def rotary_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> Tensor:
    """Radians per position of each pair of dimensions, `[head_dim / 2]` float32.

    Llama 3 scaling stretches wavelengths above `original / low_freq_factor` by `factor` and keeps those below
    `original / high_freq_factor`. Between the two, frequencies are blended linearly.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])

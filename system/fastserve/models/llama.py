"""Llama 2 and 3: RMS norm, rotary positions, grouped-query attention, SiLU-gated MLP."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastserve.config import ModelConfig
from fastserve.kernels import kernels_for
from fastserve.models.decoder import DecoderLayer, DecoderModel, Rotary
from fastserve.models.layers import Attention, Linear, Norm, Weight


class LlamaLayer(DecoderLayer):
    """One layer of Llama."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.kernels = kernels_for(device)
        self.attention = Attention(config, out_name="o_proj", bias=False, dtype=dtype, device=device)
        self.attention_norm = Norm(hidden, config.norm_eps, rms=True, dtype=dtype, device=device)
        self.mlp_norm = Norm(hidden, config.norm_eps, rms=True, dtype=dtype, device=device)
        gate_up = (("gate_proj", inner), ("up_proj", inner))
        self.gate_up = Linear(hidden, gate_up, bias=False, dtype=dtype, device=device)
        self.down = Linear(inner, (("down_proj", hidden),), bias=False, dtype=dtype, device=device)

    def mlp(self, x: Tensor) -> Tensor:
        """`[rows, hidden_size]` to the same."""
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
    layer_class = LlamaLayer

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, dtype, device)
        self.final_norm = Norm(config.hidden_size, config.norm_eps, rms=True, dtype=dtype, device=device)
        self.frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling).to(device)

    def rotary(self, positions: Tensor) -> Rotary:
        """Cosines and signed sines `[num_tokens, 1, head_dim]`, computed in float32."""
        angles = positions.unsqueeze(1) * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        dtype = self.embedding.dtype
        return torch.cat((cos, cos), 1).unsqueeze(1).to(dtype), torch.cat((-sin, sin), 1).unsqueeze(1).to(dtype)

    def weights(self) -> Iterator[Weight]:
        """Every tensor a checkpoint must have."""
        yield from super().weights()
        yield from self.final_norm.weights("model.norm")


def rotary_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> Tensor:
    """Radians per position of each pair of dimensions, `[head_dim / 2]` float32.

    With Llama 3 scaling, wavelengths beyond `original / low_freq_factor` are stretched by `factor`, those below
    `original / high_freq_factor` stay, and those between are blended linearly in their frequency.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])

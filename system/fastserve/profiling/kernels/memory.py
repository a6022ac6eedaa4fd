"""How many tokens of KV cache fit beside a model's weights."""

from __future__ import annotations

from collections.abc import Sequence

from fastserve.core.config import ModelConfig, dtype_bytes
from fastserve.core.errors import ConfigError
from fastserve.core.parallel import Place
from fastserve.latency.gpus import Gpu

USED_SHARE = 0.9
"""Of a GPU's memory that an engine takes, as `gpu_memory_utilization` of vLLM says."""
RESERVED_BYTES = 2e9
"""For activations, CUDA graphs and the CUDA context. Two recorded runs of vLLM left 1.7 and 2.4 GB."""
BLOCK = 16

FORMULA = (
    f"({USED_SHARE} x memory - weights of the shard - {RESERVED_BYTES / 1e9:g} GB for activations, CUDA graphs and the "
    f"CUDA context) / KV bytes of a token in the shard, whole blocks of {BLOCK}; the least of all stages"
)


def cache_tokens(model: ModelConfig, places: Sequence[Place], gpu: Gpu, dtype: str) -> int:
    """Tokens of KV cache by `FORMULA`; `places` are one shard of each stage. ConfigError if not even one block fits."""
    least = None
    for place in places:
        weights = shard_bytes(model, place, dtype)
        free = USED_SHARE * gpu.memory_bytes - weights - RESERVED_BYTES
        tokens = int(free / place.kv_bytes_per_token(model, dtype)) // BLOCK * BLOCK
        if tokens < BLOCK:
            raise ConfigError(
                f"model {model.name} does not fit {gpu.name}: {place} has {weights / 1e9:.1f} GB of weights, and "
                f"{USED_SHARE} of {gpu.memory_bytes / 1e9:.1f} GB less {RESERVED_BYTES / 1e9:g} GB are "
                f"{(USED_SHARE * gpu.memory_bytes - RESERVED_BYTES) / 1e9:.1f} GB; use more shards "
                "(--tensor-parallel-size) or stages (--pipeline-parallel-size)"
            )
        least = tokens if least is None else min(least, tokens)
    assert least is not None
    return least


def shard_bytes(model: ModelConfig, place: Place, dtype: str) -> int:
    """Bytes of the weights on one rank, without biases and norms."""
    attention = model.hidden_size * model.head_dim * 2 * (len(place.heads(model)) + len(place.kv_heads(model)))
    mlp = (2 if model.architecture == "opt" else 3) * model.hidden_size * len(place.inner(model))
    vocabulary = len(place.vocabulary(model)) * model.hidden_size
    numbers = place.num_layers * (attention + mlp)
    if place.is_first_stage:
        numbers += vocabulary
        if model.architecture == "opt":
            numbers += model.max_model_len * model.hidden_size
    if place.is_last_stage and not (place.is_first_stage and model.tie_word_embeddings):
        numbers += vocabulary
    return numbers * dtype_bytes(dtype)

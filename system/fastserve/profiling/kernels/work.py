"""What a shard of a stage computes: its matrix products, and the bytes that its element-wise work moves."""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.core.config import ModelConfig
from fastserve.core.parallel import Place


@dataclass(frozen=True, slots=True)
class Product:
    """A linear layer of a shard: (tokens, k) times (k, n)."""

    name: str
    n: int
    k: int


def layer_products(model: ModelConfig, place: Place) -> tuple[Product, ...]:
    """Matrix products of one layer."""
    hidden, inner = model.hidden_size, len(place.inner(model))
    heads, kv_heads = len(place.heads(model)), len(place.kv_heads(model))
    first, second = ("fc1", "fc2") if model.architecture == "opt" else ("gate_up_proj", "down_proj")
    return (
        Product("qkv_proj", (heads + 2 * kv_heads) * model.head_dim, hidden),
        Product("o_proj", hidden, heads * model.head_dim),
        Product(first, inner if model.architecture == "opt" else 2 * inner, hidden),
        Product(second, hidden, inner),
    )


def lm_head(model: ModelConfig, place: Place) -> Product:
    """The projection to the shard's part of the vocabulary."""
    return Product("lm_head", len(place.vocabulary(model)), model.hidden_size)


def layer_traffic(model: ModelConfig, place: Place) -> tuple[int, ...]:
    """Numbers that a token's element-wise operations of one layer read and write, for each operation.

    OPT: two norms, two additions of the residual, ReLU. Llama: two norms, each fused with the addition, rotary
    embedding, SiLU fused with the product. Qwen3: also the norms of queries and keys. Writing keys and values is part
    of attention.
    """
    hidden, inner = model.hidden_size, len(place.inner(model))
    queries, keys = (len(heads) * model.head_dim for heads in (place.heads(model), place.kv_heads(model)))
    if model.architecture == "opt":
        return (2 * hidden, 2 * hidden, 3 * hidden, 3 * hidden, 2 * inner)
    traffic = (4 * hidden, 4 * hidden, 2 * (queries + keys), 3 * inner)
    return (*traffic, 2 * queries, 2 * keys) if model.architecture == "qwen3" else traffic


def stage_traffic(model: ModelConfig, place: Place) -> tuple[int, ...]:
    """Numbers that a token's element-wise operations of the whole stage move: embeddings, and the last norm."""
    hidden = model.hidden_size
    embedding = (2 * hidden, 2 * hidden, 3 * hidden) if model.architecture == "opt" else (2 * hidden,)
    last_norm = (2 * hidden,) if model.architecture == "opt" else (4 * hidden,)
    return (embedding if place.is_first_stage else ()) + (last_norm if place.is_last_stage else ())

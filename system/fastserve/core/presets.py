"""Published architectures by name. Weights are not included: a preset runs with dummy weights."""

from __future__ import annotations

from typing import Any

from fastserve.core.config import ModelConfig
from fastserve.core.errors import ConfigError


def _opt(name: str, layers: int, hidden: int, heads: int) -> ModelConfig:
    return ModelConfig(
        name=name,
        architecture="opt",
        vocab_size=50_272,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=4 * hidden,
        max_model_len=2048,
        eos_token_ids=(2,),
    )


def _llama(name: str, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, **overrides: Any) -> ModelConfig:
    fields: dict[str, Any] = {"vocab_size": 32_000, "max_model_len": 4096, "eos_token_ids": (2,)} | overrides
    return ModelConfig(
        name=name,
        architecture="llama",
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate_size=ffn,
        tie_word_embeddings=False,
        **fields,
    )


_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128_256,
    "max_model_len": 8192,
    "rope_theta": 500_000.0,
    "eos_token_ids": (128_001,),
}

_LLAMA_3_1: dict[str, Any] = _LLAMA_3 | {
    "max_model_len": 131_072,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}

PRESETS: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        _opt("opt-tiny", 2, 64, 4),
        _opt("opt-125m", 12, 768, 12),
        _opt("opt-1.3b", 24, 2048, 32),
        _opt("opt-2.7b", 32, 2560, 32),
        _opt("opt-6.7b", 32, 4096, 32),
        _opt("opt-13b", 40, 5120, 40),
        _opt("opt-30b", 48, 7168, 56),
        _opt("opt-66b", 64, 9216, 72),
        _opt("opt-175b", 96, 12288, 96),
        _llama("llama-tiny", 2, 64, 4, 2, 128),
        _llama("llama-160m", 12, 768, 12, 4, 2048, max_model_len=2048),
        _llama("llama-2-7b", 32, 4096, 32, 32, 11_008),
        _llama("llama-2-70b", 80, 8192, 64, 8, 28_672),
        _llama("llama-3-8b", 32, 4096, 32, 8, 14_336, **_LLAMA_3),
        _llama("llama-3-70b", 80, 8192, 64, 8, 28_672, **_LLAMA_3),
        _llama("llama-3.1-8b", 32, 4096, 32, 8, 14_336, **_LLAMA_3_1),
        _llama("llama-3.1-70b", 80, 8192, 64, 8, 28_672, **_LLAMA_3_1),
        ModelConfig(
            name="qwen3-32b",
            architecture="qwen3",
            vocab_size=151_936,
            hidden_size=5120,
            num_layers=64,
            num_heads=64,
            num_kv_heads=8,
            head_dim=128,
            intermediate_size=25_600,
            max_model_len=40_960,
            tie_word_embeddings=False,
            norm_eps=1e-6,
            rope_theta=1_000_000.0,
            eos_token_ids=(151_645, 151_643),
        ),
    )
}
"""OPT after Zhang et al. 2022, table 1; Llama 2, 3 and 3.1 and Qwen3 after the configurations their makers published.
`*-tiny` are for tests, `llama-160m` is OPT-125m's shape with grouped-query attention. The engine does not run Qwen3."""


def preset(name: str) -> ModelConfig:
    """The architecture called `name`, or a ConfigError that lists the known ones."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ConfigError(f"unknown model preset {name!r}; known: {', '.join(PRESETS)}") from None

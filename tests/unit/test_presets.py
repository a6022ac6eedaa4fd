"""Presets are the published architectures, and a model that the engine does not run is refused in one clear error."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastserve import LLM
from fastserve.core.errors import CheckpointError, ConfigError
from fastserve.core.model_directory import find_config, read_config
from fastserve.core.presets import preset

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151_936,
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 25_600,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "hidden_act": "silu",
    "attention_bias": False,
    "eos_token_id": [151_645, 151_643],
}


@pytest.mark.parametrize(
    ("name", "billions", "kv_bytes"),
    [
        ("opt-13b", 12.85, 819_200),
        ("llama-3.1-8b", 8.03, 131_072),
        ("llama-3.1-70b", 70.55, 327_680),
        ("qwen3-32b", 32.76, 262_144),
    ],
)
def test_presets_have_the_published_sizes(name: str, billions: float, kv_bytes: int) -> None:
    config = preset(name)
    assert config.num_parameters() == pytest.approx(billions * 1e9, rel=1e-3)
    assert config.kv_bytes_per_token("bfloat16") == kv_bytes


def test_llama_3_1_is_llama_3_with_longer_contexts() -> None:
    for size in ("8b", "70b"):
        old, new = preset(f"llama-3-{size}"), preset(f"llama-3.1-{size}")
        assert new.max_model_len == 131_072
        assert new.rope_scaling is not None
        assert replace(new, name=old.name, max_model_len=old.max_model_len, rope_scaling=None) == old


def test_a_configuration_is_found_by_file_folder_or_preset(tmp_path: Path) -> None:
    folder = tmp_path / "qwen3-32b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3))
    of_file, of_folder = find_config(str(folder / "config.json")), find_config(str(folder))
    assert of_file == of_folder == read_config(folder / "config.json") == find_config("qwen3-32b")
    with pytest.raises(ConfigError, match="unknown model preset 'qwen3-33b'"):
        find_config("qwen3-33b")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        find_config(str(folder))


def test_the_engine_refuses_a_model_that_it_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    for model in ("qwen3-32b", str(tmp_path)):
        with pytest.raises(ConfigError, match="does not run architecture qwen3, only opt and llama; simulate"):
            LLM(model, load_format="dummy")

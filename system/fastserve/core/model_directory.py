"""Read a model's architecture from its `config.json` in Hugging Face format. No torch: importers of profiles use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast

from fastserve.core.config import ModelConfig
from fastserve.core.errors import CheckpointError, ConfigError
from fastserve.core.generation_config import token_ids
from fastserve.core.presets import PRESETS, preset

_ARCHITECTURES: dict[str, Literal["opt", "llama", "qwen3"]] = {
    "OPTForCausalLM": "opt",
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
}
_LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def find_config(model: str) -> ModelConfig:
    """The architecture of a preset, of a model directory, or of a `config.json`. ConfigError if there is none."""
    path = Path(model)
    if path.is_file():
        return read_config(path)
    if path.is_dir():
        return load_config(path)
    if model not in PRESETS and ("/" in model or "\\" in model or model.endswith(".json")):
        raise ConfigError(f"model {model!r} does not exist; give a preset, a model directory or its config.json")
    return preset(model)


def load_config(directory: str | Path) -> ModelConfig:
    """Read the architecture from `config.json` in `directory`.

    Raises:
        CheckpointError: the file or a key is missing, or the model is not supported.
    """
    return read_config(Path(directory) / "config.json")


def read_config(path: Path) -> ModelConfig:
    """Read the architecture from a `config.json`; the model is called as its folder. CheckpointError as above."""
    fields = read_json(path)
    names = fields.get("architectures") or []
    known = [name for name in names if name in _ARCHITECTURES]
    if not known:
        raise CheckpointError(
            f"{path}: architecture {names!r} is not supported; supported: {', '.join(_ARCHITECTURES)}"
        )
    architecture = _ARCHITECTURES[known[0]]
    try:
        return _opt_config(path, fields) if architecture == "opt" else _llama_config(path, fields, architecture)
    except KeyError as error:
        raise CheckpointError(f"{path} has no key {error.args[0]!r}") from None
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. CheckpointError if there is no file or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a model directory in Hugging Face format has one") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not an object")
    return cast(dict[str, Any], content)


def _opt_config(path: Path, fields: dict[str, Any]) -> ModelConfig:
    hidden = fields["hidden_size"]
    _require(path, fields, "do_layer_norm_before", True)
    _require(path, fields, "word_embed_proj_dim", hidden)
    _require(path, fields, "activation_function", "relu")
    _require(path, fields, "enable_bias", True)
    _require(path, fields, "layer_norm_elementwise_affine", True)
    _require(path, fields, "_remove_final_layer_norm", False)
    heads = fields["num_attention_heads"]
    return ModelConfig(
        name=path.parent.name,
        architecture="opt",
        vocab_size=fields["vocab_size"],
        hidden_size=hidden,
        num_layers=fields["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=fields["ffn_dim"],
        max_model_len=fields["max_position_embeddings"],
        tie_word_embeddings=fields.get("tie_word_embeddings", True),
        eos_token_ids=token_ids(fields.get("eos_token_id", 2)),
    )


def _llama_config(path: Path, fields: dict[str, Any], architecture: Literal["llama", "qwen3"]) -> ModelConfig:
    _require(path, fields, "hidden_act", "silu")
    _require(path, fields, "attention_bias", False)
    _require(path, fields, "mlp_bias", False)
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    # rope_parameters of transformers 5 replaces rope_theta and rope_scaling of version 4.
    rope = fields.get("rope_parameters") or {}
    scaling = rope or fields.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"{path}: rope type {kind!r} is not supported; supported: default, llama3")
    return ModelConfig(
        name=path.parent.name,
        architecture=architecture,
        vocab_size=fields["vocab_size"],
        hidden_size=hidden,
        num_layers=fields["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or hidden // heads,
        intermediate_size=fields["intermediate_size"],
        max_model_len=fields["max_position_embeddings"],
        tie_word_embeddings=fields.get("tie_word_embeddings", False),
        norm_eps=fields["rms_norm_eps"],
        rope_theta=rope.get("rope_theta", fields.get("rope_theta", 10_000.0)),
        rope_scaling={key: scaling[key] for key in _LLAMA3_SCALING} if kind == "llama3" else None,
        eos_token_ids=token_ids(fields.get("eos_token_id", 2)),
    )


def _require(path: Path, fields: dict[str, Any], key: str, value: object) -> None:
    """Raise CheckpointError if `key` has another value, which is not implemented; absent means `value`."""
    if fields.get(key, value) != value:
        raise CheckpointError(f"{path}: {key} = {fields[key]!r} is not supported, only {value!r}")

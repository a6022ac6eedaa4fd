"""Load a model's architecture and weights from a directory in Hugging Face format, or make dummy weights."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastserve.core.config import ModelConfig
from fastserve.core.errors import CheckpointError, ConfigError
from fastserve.core.generation_config import token_ids
from fastserve.runtime.models.decoder import DecoderModel
from fastserve.runtime.models.part import Weight

_EMBEDDING_STD = 0.02
_LAYER_GAIN = 2.0
"""Dummy weights: ratio of output to input standard deviation of a layer's matrices."""
_ARCHITECTURES: dict[str, Literal["opt", "llama"]] = {"OPTForCausalLM": "opt", "LlamaForCausalLM": "llama"}
_LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def load_config(directory: str | Path) -> ModelConfig:
    """Read the architecture from `config.json` in `directory`.

    Raises:
        CheckpointError: the file or a key is missing, or the model is not supported.
    """
    path = Path(directory) / "config.json"
    fields = _read_json(path)
    names = fields.get("architectures") or []
    known = [name for name in names if name in _ARCHITECTURES]
    if not known:
        raise CheckpointError(
            f"{path}: architecture {names!r} is not supported; supported: {', '.join(_ARCHITECTURES)}"
        )
    try:
        return (_opt_config if _ARCHITECTURES[known[0]] == "opt" else _llama_config)(path, fields)
    except KeyError as error:
        raise CheckpointError(f"{path} has no key {error.args[0]!r}") from None
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def load_weights(model: DecoderModel, directory: str | Path) -> None:
    """Fill `model` from `model.safetensors` in `directory`, or from the files in `model.safetensors.index.json`.

    Raises:
        CheckpointError: a file or a tensor is missing, cannot be read, or has another shape.
    """
    directory = Path(directory)
    files = _tensor_files(directory)
    wanted: dict[Path, list[tuple[str, Weight]]] = {}
    for weight in model.weights():
        # Checkpoints of a model without its head lack the leading "model.".
        name = weight.name if weight.name in files else weight.name.removeprefix("model.")
        if name not in files:
            raise CheckpointError(f"{directory} has no tensor {weight.name!r}")
        wanted.setdefault(files[name], []).append((name, weight))
    for path, weights in wanted.items():
        with _open(path) as tensors:
            present = set(tensors.keys())
            for name, weight in weights:
                if name not in present:
                    raise CheckpointError(f"{path} has no tensor {name!r}, which the index places there")
                stored = tensors.get_slice(name)
                shape = stored.get_shape()
                if shape != weight.shape:
                    raise CheckpointError(
                        f"{path}: tensor {name!r} has shape {shape}, but config.json asks for {weight.shape}"
                    )
                weight.target.copy_(tensors.get_tensor(name) if weight.is_whole else stored[weight.index])


def dummy_weights(model: DecoderModel, seed: int) -> None:
    """Fill `model` with normal weights, unit norms and zero biases.

    A tensor depends only on its name, its shape and `seed`. So a part of a model has the same values as in the whole:
    sliced tensors are made whole, one at a time.

    Layers outweigh the embedding, so that greedy output varies, which tests and measurements need. With a standard
    deviation of 0.02 everywhere, a model with tied embeddings would repeat one token.
    """
    for weight in model.weights():
        name, target = weight.name, weight.target
        if name.endswith("bias"):
            target.zero_()
        elif "norm" in name:
            target.fill_(1.0)
        else:
            generator = torch.Generator(target.device).manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
            std = _EMBEDDING_STD if "embed" in name or "lm_head" in name else _LAYER_GAIN / math.sqrt(weight.shape[1])
            if weight.is_whole:
                target.normal_(0.0, std, generator=generator)
            else:
                target.copy_(target.new_empty(weight.shape).normal_(0.0, std, generator=generator)[weight.index])


def save_weights(model: DecoderModel, path: Path) -> None:
    """Write the model's weights to a safetensors file, under Hugging Face's names."""
    tensors = {weight.name: weight.target.contiguous() for weight in model.weights()}
    save_file(tensors, path, metadata={"format": "pt"})


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


def _llama_config(path: Path, fields: dict[str, Any]) -> ModelConfig:
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
        architecture="llama",
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


def _tensor_files(directory: Path) -> dict[str, Path]:
    """The file of each tensor, by the tensor's name."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        try:
            files = {name: directory / file for name, file in _read_json(index)["weight_map"].items()}
        except KeyError:
            raise CheckpointError(f"{index} has no key 'weight_map'") from None
        for path in sorted(set(files.values())):
            if not path.is_file():
                raise CheckpointError(f"{path} is missing, although {index.name} names it")
        return files
    if single.is_file():
        with _open(single) as tensors:
            return dict.fromkeys(tensors.keys(), single)
    raise CheckpointError(f"{directory} has neither {single.name} nor {index.name}; other weight formats are not read")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a model directory in Hugging Face format has one") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not an object")
    return cast(dict[str, Any], content)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None

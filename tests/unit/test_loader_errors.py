"""A checkpoint that cannot be run is refused with the file, key or tensor at fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastserve.core.errors import CheckpointError
from fastserve.runtime.models import Part, build_model, empty_model, load_config

OPT: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "ffn_dim": 32,
    "max_position_embeddings": 20,
}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
    "rms_norm_eps": 1e-6,
}


def write_config(directory: Path, fields: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def write_checkpoint(directory: Path) -> Path:
    """A complete OPT checkpoint."""
    config = load_config(write_config(directory, OPT))
    weights = empty_model(Part.whole(config, torch.float32, torch.device("meta"))).weights()
    save_file({weight.name: torch.zeros(weight.shape) for weight in weights}, directory / "model.safetensors")
    return directory


def load(directory: Path) -> None:
    build_model(load_config(directory), torch.float32, "cpu", directory)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {**OPT, "architectures": ["GPT2LMHeadModel"]},
            r"architecture \['GPT2LMHeadModel'\] is not supported; supported: OPT",
        ),
        ({}, r"architecture \[\] is not supported"),
        (
            {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 8},
            "do_layer_norm_before = False is not supported",
        ),
        ({**OPT, "word_embed_proj_dim": 8}, "word_embed_proj_dim = 8 is not supported, only 16"),
        ({**OPT, "activation_function": "gelu"}, "activation_function = 'gelu' is not supported, only 'relu'"),
        ({k: v for k, v in OPT.items() if k != "ffn_dim"}, "has no key 'ffn_dim'"),
        ({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope type 'yarn' is not supported"),
        ({**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "has no key 'factor'"),
        ({**LLAMA, "attention_bias": True}, "attention_bias = True is not supported"),
        ({**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 3}, "4 attention heads do not divide into 3"),
    ],
)
def test_unsupported_configuration(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_config(write_config(tmp_path, fields))


def test_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/config\.json does not exist"):
        load_config(tmp_path / "nowhere")


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read as JSON"), ("[]", "holds list, not an object")])
def test_configuration_that_is_not_an_object(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_config(tmp_path)


def test_complete_checkpoint_loads_with_and_without_prefix(tmp_path: Path) -> None:
    load(write_checkpoint(tmp_path))
    path = tmp_path / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}, path)
    load(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    write_config(tmp_path, OPT)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(tmp_path)


def test_missing_tensor(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.decoder.layers.0.self_attn.k_proj.weight"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"has no tensor 'model\.decoder\.layers\.0\.self_attn\.k_proj\.weight'"):
        load(tmp_path)


def test_tensor_of_another_shape(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    save_file({**load_file(path), "model.decoder.layers.0.fc1.weight": torch.zeros(31, 16)}, path)
    with pytest.raises(
        CheckpointError, match=r"fc1\.weight' has shape \[31, 16\], but config\.json asks for \[32, 16\]"
    ):
        load(tmp_path)


def test_truncated_file(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load(tmp_path)


def test_index_names_a_missing_shard(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    index = {"weight_map": dict.fromkeys(load_file(path), "model-00002-of-00002.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        load(tmp_path)


def test_index_places_a_tensor_in_the_wrong_shard(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    names = list(load_file(path))
    save_file({"other": torch.zeros(1)}, tmp_path / "b.safetensors")
    index = {"weight_map": dict.fromkeys(names, path.name) | {names[0]: "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="which the index places there"):
        load(tmp_path)

"""Load a model's weights from a directory in Hugging Face format, or make dummy weights."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastserve.core.errors import CheckpointError
from fastserve.core.model_directory import read_json
from fastserve.runtime.models.decoder import DecoderModel
from fastserve.runtime.models.part import Weight

_EMBEDDING_STD = 0.02
_LAYER_GAIN = 2.0
"""Dummy weights: ratio of output to input standard deviation of a layer's matrices."""


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


def _tensor_files(directory: Path) -> dict[str, Path]:
    """The file of each tensor, by the tensor's name."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        try:
            files = {name: directory / file for name, file in read_json(index)["weight_map"].items()}
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


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None

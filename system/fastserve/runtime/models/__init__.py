"""Decoder models, by family, and their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastserve.core.config import ModelConfig
from fastserve.core.errors import ConfigError
from fastserve.core.model_directory import load_config
from fastserve.core.parallel import Place
from fastserve.runtime.models.batch import ForwardBatch, SequenceInput
from fastserve.runtime.models.decoder import DecoderModel
from fastserve.runtime.models.llama import LlamaModel
from fastserve.runtime.models.loader import dummy_weights, load_weights
from fastserve.runtime.models.opt import OPTModel
from fastserve.runtime.models.part import Part
from fastserve.runtime.parallel.groups import ALONE, Group

__all__ = [
    "DecoderModel",
    "ForwardBatch",
    "Part",
    "SequenceInput",
    "build_model",
    "dummy_model",
    "empty_model",
    "load_config",
    "require_implemented",
    "shared_models",
]

_FAMILIES: dict[str, type[DecoderModel]] = {"opt": OPTModel, "llama": LlamaModel}
_shared: dict[Any, DecoderModel] | None = None


@contextmanager
def shared_models() -> Iterator[None]:
    """Within, equal models are built once and shared, since running a model does not change it. Do not nest.

    It saves memory and makes engines comparable: on a CPU, the speed of a copy of the weights depends on its place in
    memory (measured: by up to 17 %).
    """
    global _shared
    _shared = {}
    try:
        yield
    finally:
        _shared = None


def build_model(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    source: int | str | Path = 0,
    place: Place | None = None,
    group: Group = ALONE,
) -> DecoderModel:
    """Build a model, or a part of one, ready to run.

    Args:
        config: architecture of the whole model.
        dtype: of the weights.
        device: where it runs.
        source: directory of the weights, or an integer: the seed of dummy weights.
        place: the part to build; None: the whole.
        group: the shards that share its layers.

    Raises:
        CheckpointError: the directory lacks a file or a tensor, or a tensor has another shape than `config` says.
    """
    key = (repr(config), dtype, str(device), source, place, group)
    if _shared is not None and key in _shared:
        return _shared[key]
    model = empty_model(Part(config, place or Place.whole(config), group, dtype, torch.device(device)))
    if isinstance(source, int):
        dummy_weights(model, source)
    else:
        load_weights(model, source)
    model.pack()
    model.eval()
    if _shared is not None:
        _shared[key] = model
    return model


def dummy_model(config: ModelConfig, seed: int) -> DecoderModel:
    """A whole model on the CPU with dummy float32 weights, not packed: its weights can be read."""
    model = empty_model(Part.whole(config, torch.float32, torch.device("cpu")))
    dummy_weights(model, seed)
    return model


def empty_model(part: Part) -> DecoderModel:
    """A model, or a part of one, with uninitialized weights. ConfigError for an architecture that does not run."""
    require_implemented(part.config)
    return _FAMILIES[part.config.architecture](part)


def require_implemented(config: ModelConfig) -> None:
    """Raise ConfigError for a model that profiles know and the engine does not run."""
    if config.architecture not in _FAMILIES:
        raise ConfigError(
            f"model {config.name}: the engine does not run architecture {config.architecture}, only "
            f"{' and '.join(_FAMILIES)}; simulate the model with a profile of it (`fastbench profiles`)"
        )

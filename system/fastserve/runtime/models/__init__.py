"""Decoder families and their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastserve.core.config import ModelConfig
from fastserve.core.parallel import Place
from fastserve.runtime.models.batch import ForwardBatch, SequenceInput
from fastserve.runtime.models.decoder import DecoderModel
from fastserve.runtime.models.llama import LlamaModel
from fastserve.runtime.models.loader import dummy_weights, load_config, load_weights
from fastserve.runtime.models.opt import OPTModel
from fastserve.runtime.models.part import Part
from fastserve.runtime.parallel.groups import ALONE, Group

__all__ = [
    "DecoderModel",
    "ForwardBatch",
    "Part",
    "SequenceInput",
    "build_model",
    "empty_model",
    "load_config",
    "shared_models",
]

_FAMILIES: dict[str, type[DecoderModel]] = {"opt": OPTModel, "llama": LlamaModel}
_shared: dict[Any, DecoderModel] | None = None


@contextmanager
def shared_models() -> Iterator[None]:
    """Within, what would be the same model is one: running it changes nothing in it. Not to be nested.

    Saves memory, and makes engines comparable: on a CPU, copies of the same weights differ in speed for as long as they
    live, by where in memory they happen to lie (measured: up to 17 %).
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
    """A model ready to run: weights from the directory `source`, or dummy ones if `source` is an integer, a seed.

    With a `place` it is the part of the model there, which shares its layers with the other shards of `group`.

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


def empty_model(part: Part) -> DecoderModel:
    """A model, or a part of one, whose weights are yet to be loaded."""
    return _FAMILIES[part.config.architecture](part)

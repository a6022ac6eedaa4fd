"""Decoder families and their weights."""

from __future__ import annotations

from pathlib import Path

import torch

from fastserve.config import ModelConfig
from fastserve.models.batch import ForwardBatch, SequenceInput
from fastserve.models.decoder import DecoderModel
from fastserve.models.llama import LlamaModel
from fastserve.models.loader import dummy_weights, load_config, load_weights
from fastserve.models.opt import OPTModel

__all__ = ["DecoderModel", "ForwardBatch", "SequenceInput", "build_model", "load_config"]

_FAMILIES: dict[str, type[DecoderModel]] = {"opt": OPTModel, "llama": LlamaModel}


def build_model(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu", source: int | str | Path = 0
) -> DecoderModel:
    """A model ready to run: weights from the directory `source`, or dummy ones if `source` is an integer, a seed.

    Raises:
        CheckpointError: the directory lacks a file or a tensor, or a tensor has another shape than `config` says.
    """
    model = _FAMILIES[config.architecture](config, dtype, torch.device(device))
    if isinstance(source, int):
        dummy_weights(model, source)
    else:
        load_weights(model, source)
    model.pack()
    return model.eval()

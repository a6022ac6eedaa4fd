"""Find the model: a directory in Hugging Face format, or a preset's architecture with dummy weights."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from fastserve.core.config import ModelConfig
from fastserve.core.errors import ConfigError
from fastserve.core.model_directory import load_config
from fastserve.core.presets import PRESETS, preset
from fastserve.runtime.models import require_implemented


def resolve_model(model: str | Path, load_format: str) -> tuple[ModelConfig, Path | None]:
    """Architecture, and the directory of the weights or None for dummy weights.

    ConfigError for an unknown model, or for one that the engine does not run.
    """
    if load_format not in ("auto", "dummy"):
        raise ConfigError(f"load_format must be auto or dummy, got {load_format!r}")
    if Path(model).is_dir():
        config = load_config(Path(model))
        require_implemented(config)
        return config, Path(model) if load_format == "auto" else None
    if str(model) not in PRESETS and ("/" in str(model) or "\\" in str(model)):
        raise ConfigError(f"model directory {str(model)!r} does not exist")
    config = preset(str(model))
    require_implemented(config)
    if load_format != "dummy":
        raise ConfigError(f"preset {model!r} has no weights: use load_format dummy, or give a model directory")
    return config, None


def model_digest(config: ModelConfig, directory: Path | None) -> str:
    """A digest of architecture and names and sizes of the weight files, the same in any directory."""
    files = (
        []
        if directory is None
        else sorted((path.name, path.stat().st_size) for path in directory.glob("*.safetensors"))
    )
    return hashlib.sha256(repr((replace(config, name=""), files)).encode()).hexdigest()[:16]

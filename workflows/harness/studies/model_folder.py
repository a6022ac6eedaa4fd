"""A small model as a folder in Hugging Face format, so that servers of all kinds read the same weights.

The weights are random, from a seed. The words of the tokenizer are w0, w1, …, a token each. A chat is the words of its
messages in order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastserve.core.config import ModelConfig
from fastserve.core.errors import OutputError
from fastserve.core.files import atomic_write

_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def write_model_folder(architecture: Mapping[str, Any], folder: Path, seed: int = 0) -> ModelConfig:
    """Write the model to `folder`, which is made if missing; return its configuration.

    `architecture` is the content of a config.json in Hugging Face format. The same arguments give the same files.
    Raises CheckpointError for an unsupported architecture, OutputError if the folder cannot be written.
    """
    from fastserve.runtime.models import dummy_model, load_config
    from fastserve.runtime.models.loader import save_weights

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}") from error
    _write_json(folder / "config.json", architecture)
    config = load_config(folder)
    with atomic_write(folder / "model.safetensors") as staging:
        save_weights(dummy_model(config, seed), staging)
    _write_tokenizer(config, folder)
    return config


def _write_tokenizer(config: ModelConfig, folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with atomic_write(folder / "tokenizer.json") as staging:
        tokenizer.save(str(staging))
    about: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "w0",
        "model_max_length": config.max_model_len,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    if config.eos_token_ids:
        about["eos_token"] = f"w{config.eos_token_ids[0]}"
    _write_json(folder / "tokenizer_config.json", about)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as staging:
        staging.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")

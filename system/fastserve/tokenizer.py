"""Tokenizers in Hugging Face format, from a directory; nothing is ever fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastserve.errors import ConfigError

_FILES = ("tokenizer.json", "tokenizer_config.json")


def has_tokenizer(directory: str | Path) -> bool:
    """Whether there is one in the directory."""
    return any((Path(directory) / name).is_file() for name in _FILES)


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer in `directory`, of transformers. ConfigError if there is none that loads."""
    if not Path(directory).is_dir():
        raise ConfigError(f"tokenizer {str(directory)!r} is not a directory; give one in Hugging Face format")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # The library raises many types for a directory it cannot use.
        raise ConfigError(f"tokenizer {str(directory)!r} could not be loaded: {error}") from error

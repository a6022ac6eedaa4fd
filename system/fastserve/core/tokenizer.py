"""Load tokenizers in Hugging Face format from a directory; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from fastserve.core.errors import ConfigError

BUILTIN = Path(__file__).parent / "builtin_tokenizer"
"""The directory of the built-in tokenizer, which `tools/make_tokenizer.py` writes."""
BUILTIN_NAME, NO_TOKENIZER = "builtin", "none"
"""Values of `--tokenizer` that are not directories."""
_FILES = ("tokenizer.json", "tokenizer_config.json")


def has_tokenizer(directory: str | Path) -> bool:
    """Whether the directory holds a tokenizer."""
    return any((Path(directory) / name).is_file() for name in _FILES)


def tokenizer_directory(model: str | Path | None, tokenizer: str | Path | None) -> Path | None:
    """The directory of the tokenizer to use; None for no tokenizer.

    Args:
        model: a model directory, which may hold the tokenizer; a preset or None: use the built-in tokenizer.
        tokenizer: a directory, "builtin" or "none", which comes before `model`; None: decide by `model`.

    Raises:
        ConfigError: `tokenizer` is none of these.
    """
    if tokenizer is None:
        if model is None or not Path(model).is_dir():
            return BUILTIN
        return Path(model) if has_tokenizer(model) else None
    if str(tokenizer) == NO_TOKENIZER:
        return None
    if str(tokenizer) == BUILTIN_NAME:
        return BUILTIN
    if not Path(tokenizer).is_dir():
        raise ConfigError(
            f"tokenizer {str(tokenizer)!r} is not a directory; give one in Hugging Face format, or "
            f"{BUILTIN_NAME} or {NO_TOKENIZER}"
        )
    return Path(tokenizer)


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer in `directory`, by transformers, or the built-in one; ConfigError if it cannot be loaded."""
    found = tokenizer_directory(None, directory)
    if found is None:
        raise ConfigError(f"tokenizer {str(directory)!r}: text needs one; give a directory or {BUILTIN_NAME}")
    if found == BUILTIN:
        return BuiltinTokenizer()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(found), local_files_only=True)
    except Exception as error:  # The library raises many types for a directory it cannot use.
        raise ConfigError(f"tokenizer {str(directory)!r} could not be loaded: {error}") from error


class Encoded(NamedTuple):
    """Several texts as tokens."""

    input_ids: list[list[int]]


class BuiltinTokenizer:
    """The built-in tokenizer, with the part of transformers' interface that is used here.

    It loads in milliseconds and imports neither transformers nor torch, so simulations use it by default.
    """

    def __init__(self) -> None:
        from tokenizers import Tokenizer

        self.backend_tokenizer = Tokenizer.from_file(str(BUILTIN / "tokenizer.json"))
        about = json.loads((BUILTIN / "tokenizer_config.json").read_text(encoding="utf-8"))
        self.chat_template: str = about["chat_template"]
        self.eos_token: str = about["eos_token"]
        self.eos_token_id: int | None = self.backend_tokenizer.token_to_id(self.eos_token)

    def __len__(self) -> int:
        """Size of the vocabulary, special tokens included."""
        size: int = self.backend_tokenizer.get_vocab_size()
        return size

    def get_vocab(self) -> dict[str, int]:
        """Ids by token, special tokens included."""
        vocabulary: dict[str, int] = self.backend_tokenizer.get_vocab()
        return vocabulary

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """Token ids of several texts."""
        return Encoded([each.ids for each in self.backend_tokenizer.encode_batch(list(texts))])

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. There are no special tokens to add."""
        ids: list[int] = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids; ids beyond the vocabulary have no text."""
        text: str = self.backend_tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], *, tokenize: bool = False, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation."""
        assert not tokenize
        return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt)

    @cached_property
    def _template(self) -> Any:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        return ImmutableSandboxedEnvironment().from_string(self.chat_template)

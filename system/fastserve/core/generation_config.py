"""generation_config.json: a model's own sampling defaults and end-of-sequence tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastserve.core.checks import require_int
from fastserve.core.errors import CheckpointError, ConfigError
from fastserve.core.request import SamplingParams

NAME = "generation_config.json"
CHOICES = ("auto", "none")
"""Read the file in the model's directory, or ignore it."""
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """The fields of the file that are used; what the file leaves out is empty."""

    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end an output."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of SamplingParams fields, such as temperature and top_p."""
    max_new_tokens: int | None = None
    """Most output tokens of a request that sets no limit."""


def load_generation_config(directory: Path | None, choice: str = "auto") -> GenerationConfig:
    """Read `generation_config.json` in `directory`; empty if there is none, or if `choice` is "none".

    Raises ConfigError for an unknown choice, CheckpointError for a file that cannot be read or has a wrong value.
    """
    if choice not in CHOICES:
        raise ConfigError(f"generation_config must be {' or '.join(CHOICES)}, got {choice!r}")
    if choice == "none" or directory is None or not (directory / NAME).is_file():
        return GenerationConfig()
    path = directory / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ConfigError(f"it holds {type(content).__name__}, not an object")
        return _parse({name: value for name, value in content.items() if value is not None})
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}; mend the file, or ignore it with generation_config none") from error


def token_ids(value: Any) -> tuple[int, ...]:
    """Parse `eos_token_id`: one id, a list of ids, or null. ConfigError for anything else."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for each in ids:
        require_int("eos_token_id", each, 0)
    return tuple(ids)


def _parse(content: Mapping[str, Any]) -> GenerationConfig:
    sampling = {name: content[name] for name in _SAMPLING if name in content}
    for name, value in sampling.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{name} must be a number, got {value!r}")
    SamplingParams(**sampling)
    max_new_tokens = content.get("max_new_tokens")
    if max_new_tokens is not None:
        require_int("max_new_tokens", max_new_tokens, 1)
    return GenerationConfig(token_ids(content.get("eos_token_id")), sampling, max_new_tokens)

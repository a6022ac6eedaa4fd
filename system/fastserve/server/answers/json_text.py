"""JSON of large values, written without holding up other threads."""

from __future__ import annotations

import json
from typing import Any

_LEVELS = 5
"""From an answer down to one token's entry: answer, choices, choice, log probabilities, entry."""
_AT_ONCE = 1000
"""Elements of a list that one call of `json.dumps` writes."""


def json_in_pieces(value: Any, levels: int = _LEVELS) -> str:
    """Return the text of `json.dumps(value)`, written by many short calls into C instead of one long call.

    For use in a thread: the interpreter switches between the calls.
    """
    if levels and isinstance(value, dict):
        parts = [f"{json.dumps(name)}: {json_in_pieces(each, levels - 1)}" for name, each in value.items()]
        return "{" + ", ".join(parts) + "}"
    if isinstance(value, list):
        if levels and value and isinstance(value[-1], dict | list):
            parts = [json_in_pieces(each, levels - 1) for each in value]
        else:
            parts = [json.dumps(value[start : start + _AT_ONCE])[1:-1] for start in range(0, len(value), _AT_ONCE)]
        return "[" + ", ".join(parts) + "]"
    return json.dumps(value)

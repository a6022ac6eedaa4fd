"""JSON of what may be large, without keeping other threads waiting."""

from __future__ import annotations

import json
from typing import Any

_LEVELS = 5
"""From an answer down to what is said of one token: answer, choices, choice, its log probabilities, a place."""
_AT_ONCE = 1000


def json_in_pieces(value: Any, levels: int = _LEVELS) -> str:
    """The same text as `json.dumps`, which is one call into C however large the value is; for use in a thread."""
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

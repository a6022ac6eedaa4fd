"""A note for results that replace results of another configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_SHOWN = 4


def replacement_note(path: Path, now: Mapping[str, Any], *keys: str) -> str:
    """Say how the JSON file at `path` differs from its replacement `now` under `keys`; empty without a difference.

    Keys that only one of them has do not count, since an older version knew fewer options. A missing file gives no
    note.
    """
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if not isinstance(before, dict):
        return ""
    as_json = json.loads(json.dumps({key: now[key] for key in keys}))
    differing = [text for key in keys for text in _differences(before.get(key), as_json[key])]
    if not differing:
        return ""
    more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    made = f" of {before['created_at']}" if "created_at" in before else ""
    return (
        f"{path.parent} held other results{made}, now replaced: {'; '.join(differing[:_SHOWN])}{more}; "
        "give another --out to keep both"
    )


def _differences(before: object, now: object, name: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in now:
            if key in before:
                yield from _differences(before[key], now[key], key)
    elif before != now and name:
        yield f"{name} was {json.dumps(before)}, is {json.dumps(now)}"

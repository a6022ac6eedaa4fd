"""Files of the pipeline: tables as CSV, other results as JSON. Each is written in one step, or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from fastserve.core.errors import ConfigError
from fastserve.core.files import atomic_write


def read_table(path: Path) -> pd.DataFrame:
    """Read a table of an experiment, its points or its capacities. The name of an unnamed panel is an empty text."""
    text = {"panel": str, "series": str, "label": str, "policy": str, "run": str}
    table = pd.read_csv(path, dtype=text)
    return table.assign(panel=table["panel"].fillna("") if "panel" in table else "")


def provenance(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Read meta.json of each folder: commit, versions, hardware. Raises ConfigError if one is missing."""
    return [read_json(folder / "meta.json") for folder in folders]


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV; the same table gives the same bytes."""
    with atomic_write(path) as staging:
        table.to_csv(staging, index=False, lineterminator="\n", encoding="utf-8")


def write_json(content: Any, path: Path) -> None:
    """Write `content` as JSON."""
    with atomic_write(path) as staging:
        staging.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ConfigError, with the remedy, if it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}; delete it and run the pipeline again") from error

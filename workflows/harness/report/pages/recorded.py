"""The tables that a committed page was made from: small CSV files in docs/tables, each with a line of provenance."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fastserve.core.errors import ConfigError
from fastserve.core.files import atomic_write
from harness.report.pages.results import Results
from harness.report.pages.source import AGAINST_ITSELF, MEASURES, TABLES, Row, find, key_of, tables_in

FIDELITY = "fidelity"
"""Pairs that were measured in real time on one machine: runs are added to it."""
_KEYS = {MEASURES: "measure"}
"""The column by which rows are found, of tables that are not by experiment."""
_TEXT = dict.fromkeys(("panel", "title", "series", "label", "experiment", "at", "measure"), str)


class Recorded:
    """The tables in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._tables = {
            name: read_recorded(folder / f"{name}.csv")[0]
            for name in ("claims", *TABLES, MEASURES, AGAINST_ITSELF, FIDELITY)
        }
        self._folder = folder
        self.provenance = read_recorded(folder / "claims.csv")[1]

    def claims(self) -> pd.DataFrame:
        """See `Source`."""
        return self._tables["claims"]

    def table(self, name: str, experiment: str) -> pd.DataFrame:
        """See `Source`."""
        table = self._tables[name]
        self._require(table["experiment"], experiment, f"{name} of experiment")
        return table[table["experiment"] == experiment]

    def against_itself(self) -> pd.DataFrame:
        """See `Source`."""
        return self._tables[AGAINST_ITSELF]

    def estimate(self, measure: Mapping[str, Any]) -> Row:
        """See `Source`."""
        table, key = self._tables[MEASURES], key_of(measure)
        self._require(table["measure"], key, "measure")
        return dict(table[table["measure"] == key].iloc[0])

    def ready_tables(self, experiment: str) -> list[str]:
        """See `Source`."""
        self._require((path.stem for path in self._folder.glob("*.md")), experiment, "tables of experiment")
        _, text = _read(self._folder / f"{experiment}.md")
        return tables_in(text)

    def fidelity(self) -> pd.DataFrame:
        """See `Source`."""
        return self._tables[FIDELITY]

    def _require(self, names: Iterable[str], name: str, what: str) -> None:
        try:
            find(names, name, what)
        except ConfigError as error:
            raise ConfigError(
                f"{self._folder}: {error} A page that takes more than is recorded needs fresh tables: "
                "`make reproduce`, then `python tools/write_pages.py`"
            ) from None


def record(results: Results, folder: Path) -> None:
    """Write what pages have taken of the results to `folder`: a table of each kind, and all claims."""
    write_recorded(results.claims(), results.provenance, folder / "claims.csv")
    for name, parts in results.taken.items():
        table = (
            pd.concat(parts.values(), ignore_index=True)
            if parts
            else pd.DataFrame(columns=[_KEYS.get(name, "experiment")])
        )
        write_recorded(table, results.provenance, folder / f"{name}.csv")
    for experiment, text in results.taken_texts.items():
        _write(text, results.provenance, folder / f"{experiment}.md")


def read_recorded(path: Path) -> tuple[pd.DataFrame, str]:
    """Read a table and its line of provenance. Raises ConfigError if there is none."""
    provenance, text = _read(path)
    table = pd.read_csv(io.StringIO(text), dtype=_TEXT)
    return table.assign(panel=table["panel"].fillna("")) if "panel" in table else table, provenance


def write_recorded(table: pd.DataFrame, provenance: str, path: Path) -> None:
    """Write a table below its line of provenance."""
    _write(table.to_csv(index=False, lineterminator="\n"), provenance, path)


def _read(path: Path) -> tuple[str, str]:
    try:
        first, _, rest = path.read_text(encoding="utf-8").partition("\n")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; `python tools/write_pages.py` writes it") from None
    if not first.startswith("# "):
        raise ConfigError(f"{path} must begin with a line of provenance, '# Commit …', not {first[:60]!r}")
    return first.removeprefix("# "), rest


def _write(text: str, provenance: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as staging:
        staging.write_text(f"# {provenance}\n{text}", encoding="utf-8")

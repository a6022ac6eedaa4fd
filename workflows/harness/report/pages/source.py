"""Where the numbers of a page come from, and how rows are found in it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import pandas as pd

from fastserve.core.errors import ConfigError

Row = Mapping[str, Any]
Names = str | Sequence[str] | None
"""One name, several, or all."""

MEASURES, AGAINST_ITSELF = "measures", "a-a"
"""Names of the recorded tables that no single experiment has."""
TABLES = ("capacity", "comparisons", "targets")
"""Tables of an experiment."""
OVERALL = "overall"
"""The kind of a measure that has a target's keys: a ratio of two series over many settings."""


class Source(Protocol):
    """Tables of results. Each method raises ConfigError for a name that is not there."""

    @property
    def provenance(self) -> str:
        """Commit, seeds and core of the tables, in a sentence."""

    def claims(self) -> pd.DataFrame:
        """Every claim and its verdict, as in results/headline/claims.csv."""

    def table(self, name: str, experiment: str) -> pd.DataFrame:
        """One of `TABLES` of an experiment, as results/EXPERIMENT/NAME.csv, with the `title` of each row's panel."""

    def against_itself(self) -> pd.DataFrame:
        """How often series differ from themselves: `harness.analysis.against_itself.shares`."""

    def estimate(self, measure: Mapping[str, Any]) -> Row:
        """A measure's `value`, `low` and `high`. Its keys are those of a claim's measure, or of a target's.

        A target's are experiment, metric, of, over, statistic, at and panels, and its kind is `overall`.
        """

    def ready_tables(self, experiment: str) -> list[str]:
        """Tables that the experiment's own step has written in Markdown: results/EXPERIMENT/tables.md."""

    def fidelity(self) -> pd.DataFrame:
        """Pairs of real runs and simulations that were measured on this project's machine: `pairs.csv` of several runs.

        The columns are those of `harness.analysis.pairs`, with `experiment` and `run` (1, 2, …) before.
        """


def tables_in(text: str) -> list[str]:
    """The tables of a Markdown text, which blank lines divide."""
    return [part.strip() for part in text.split("\n\n")]


def key_of(measure: Mapping[str, Any]) -> str:
    """A measure as text: the same for the same keys and values."""
    return json.dumps(dict(sorted(measure.items())))


def find(names: Iterable[str], name: str, what: str) -> None:
    """Raise ConfigError, with the name that may be meant, if `name` is not among `names`."""
    known = list(dict.fromkeys(map(str, names)))
    if name not in known:
        meant = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {meant[0]!r}?" if meant else f"there are: {', '.join(known) or 'none'}"
        raise ConfigError(f"no {what} {name!r}; {hint}")


def only(table: pd.DataFrame, column: str, names: Names) -> pd.DataFrame:
    """The rows with one of the names in a column; all for None. Raises ConfigError for a name that no row has."""
    if names is None:
        return table
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        find(table[column].dropna(), name, f"{column} in the table")
    return table[table[column].isin(wanted)]

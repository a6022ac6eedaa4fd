"""Functions of a page on claims: rows of results/headline/claims.csv, by the ids of workflows/config/claims.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from fastserve.core.errors import ConfigError
from harness.analysis.verdicts import VERDICTS
from harness.report.captions import false_alarms
from harness.report.pages.numbers import claimed, interval, percent, short, with_interval, without_empty_columns
from harness.report.pages.source import Names, Source, find, only


class ClaimFunctions:
    """What we measure for a claim, what the paper and its authors' rerun say, and the verdict."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def claim(self, name: str) -> str:
        """What we measure, with its 95 % interval: "2.60 (2.54 to 2.66)"."""
        row = self._claim(name)
        said = with_interval(row["value"], row["low"], row["high"])
        if not said:
            raise ConfigError(f"claim {name!r} has no value: {row['reason']}")
        return said

    def value(self, name: str) -> str:
        """The same without the interval."""
        return short(self.number(name))

    def inverse(self, name: str) -> str:
        """One over what we measure, with its interval: a slowdown for a speed-up."""
        row = self._claim(name)
        return with_interval(*(1 / float(row[end]) for end in ("value", "high", "low")))

    def number(self, name: str, column: str = "value") -> float:
        """A number of a claim's row, to reckon with; {{ (number("a") / number("b")) | short }}."""
        row = self._claim(name)
        find(row, column, "column of claims.csv")
        if pd.isna(row[column]):
            raise ConfigError(f"claim {name!r} has no {column}")
        return float(row[column])

    def paper(self, name: str) -> str:
        """What the paper claims: "2.03", "1.46 to 1.64"."""
        row = self._claim(name)
        return claimed(row["paper_low"], row["paper_high"])

    def rerun(self, name: str) -> str:
        """The same measure on the points of the authors' rerun; empty without such points."""
        return short(self._claim(name)["rerun"])

    def sample(self, name: str) -> str:
        """Where one sample of the paper's size lies, with a probability of 95 %: "2.31 to 2.92"."""
        row = self._claim(name)
        return interval(row["sample_low"], row["sample_high"])

    def retained(self, name: str) -> str:
        """How much of the claimed effect is there: "0.41"."""
        return f"{self.number(name, 'retained_effect'):z.2f}"

    def verdict(self, name: str) -> str:
        """The verdict, as docs/verdicts.md defines it."""
        return str(self._claim(name)["verdict"])

    def difference(self, name: str) -> str:
        """Ours over the paper's value, or over the nearest that it claims, less 1: "+28 %"."""
        row = self._claim(name)
        low, high = float(row["paper_low"]), float(row["paper_high"])
        value = float(row["value"])
        return percent(0.0 if low < high and low <= value <= high else value / (low if value < low else high) - 1)

    def reason(self, name: str) -> str:
        """The reason, as it is written in claims.yaml."""
        reason = self._claim(name)["reason"]
        return reason if isinstance(reason, str) else ""

    def span(self, *names: str) -> str:
        """The smallest and the largest of several claims' values: "1.33 to 3.00"."""
        values = [self.number(name) for name in names]
        return f"{short(min(values))} to {short(max(values))}"

    def count(self, verdict: str | None = None, group: Names = "paper", experiment: Names = None) -> int:
        """How many claims there are, or how many have a verdict."""
        rows = self._claims(group, experiment)
        if verdict is None:
            return len(rows)
        find(VERDICTS, verdict, "verdict")
        return int((rows["verdict"] == verdict).sum())

    def counts(self, group: Names = "paper", experiment: Names = None) -> str:
        """How many claims have which verdict: "9 consistent, 12 attenuated, 1 untestable"."""
        found = self._claims(group, experiment)["verdict"].value_counts()
        order = [*VERDICTS, *sorted(set(found.index) - set(VERDICTS))]
        return ", ".join(f"{found[verdict]} {verdict}" for verdict in order if verdict in found)

    def claims_table(self, group: Names = None, experiment: Names = None, ids: Sequence[str] | None = None) -> str:
        """A row for each claim: the paper's value, the rerun's, ours, one sample's, the effect retained, verdict."""
        rows = self._claims(group, experiment)
        if ids is not None:
            rows = pd.DataFrame([self._claim(name) for name in ids])
        lines = []
        for row in rows.to_dict("records"):
            tuned = " (tuned)" if isinstance(row["tuned"], str) else ""
            ours = with_interval(row["value"], row["low"], row["high"]) or "not measured"
            sample = interval(row["sample_low"], row["sample_high"])
            retained = "" if pd.isna(row["retained_effect"]) else f"{row['retained_effect']:z.2f}"
            theirs = claimed(row["paper_low"], row["paper_high"])
            lines.append(
                [row["claim"], theirs, short(row["rerun"]), ours, sample, retained, f"{row['verdict']}{tuned}"]
            )
        header = ["claim", "paper", "rerun", "ours (95 %)", "one sample (95 %)", "effect retained", "verdict"]
        return without_empty_columns(header, lines)

    def findings_table(self, group: Names = "beyond", experiment: Names = None) -> str:
        """A row for each finding that gets no verdict: the authors' number, if there is one, the value, and a note."""
        rows = self._claims(group, experiment).to_dict("records")
        return without_empty_columns(
            ["finding", "paper", "value (95 %)", "note"],
            [
                [
                    row["claim"],
                    claimed(row["paper_low"], row["paper_high"]),
                    with_interval(row["value"], row["low"], row["high"]) or "not measured",
                    row["reason"] if isinstance(row["reason"], str) else "",
                ]
                for row in rows
            ],
        )

    def false_alarms(self) -> str:
        """How often a series differs from itself, in sentences: a check of the intervals."""
        return " ".join(false_alarms(self._source.against_itself()))

    def _claim(self, name: str) -> dict[str, Any]:
        table = self._source.claims()
        find(table["id"], name, "claim")
        return dict(table[table["id"] == name].iloc[0])

    def _claims(self, group: Names, experiment: Names) -> pd.DataFrame:
        return only(only(self._source.claims(), "group", group), "experiment", experiment)

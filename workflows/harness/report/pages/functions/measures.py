"""Functions of a page on targets (results/EXPERIMENT/targets.csv) and on any other measure of an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from fastserve.core.errors import ConfigError
from harness.report.pages.numbers import markdown, short, with_interval
from harness.report.pages.source import OVERALL, Row, Source, find


class MeasureFunctions:
    """Ratios that were set as targets, and measures that no claim is held against."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def target(self, experiment: str, claim: str) -> str:
        """The ratio of a target, by its sentence, with its interval: "0.77 (0.75 to 0.79)"."""
        row = self._target(experiment, claim)
        return with_interval(row["value"], row["low"], row["high"])

    def target_value(self, experiment: str, claim: str) -> str:
        """The same without the interval."""
        return short(self._target(experiment, claim)["value"])

    def met(self, experiment: str, claim: str) -> str:
        """Whether a target is met: "met", "missed" or "unknown"."""
        return _met(self._target(experiment, claim))

    def targets_table(self, *experiments: str) -> str:
        """A row for each target of the experiments: its bound, the ratio with its interval, met or missed, where."""
        lines = [
            [
                row["claim"],
                f"≤ {row['at_most']:g}",
                with_interval(row["value"], row["low"], row["high"]),
                _met(row),
                row["where"] if isinstance(row["where"], str) else "",
            ]
            for name in experiments
            for row in self._source.table("targets", name).to_dict("records")
        ]
        return markdown(["target", "bound", "ratio (95 %)", "", "largest in"], lines)

    def measured(self, kind: str, experiment: str, **keys: Any) -> str:
        """A measure with the keys of a claim's, and its interval: measured("ratio", "fig16", of=…, over=…, x=2)."""
        row = self._measure(kind, experiment, keys)
        return with_interval(row["value"], row["low"], row["high"])

    def measured_number(self, kind: str, experiment: str, **keys: Any) -> float:
        """The same as a number."""
        return float(self._measure(kind, experiment, keys)["value"])

    def ratio(
        self,
        experiment: str,
        of: str,
        over: str,
        metric: str = "mean_normalized_latency_s",
        at: Sequence[float | str] | float | str | None = None,
        panels: Sequence[str] | str | None = None,
        statistic: str = "geometric_mean",
    ) -> str:
        """The metric of one series over that of another, with its interval: below 1, `of` is the better.

        It is over all panels and x that both series have, or those named: their `geometric_mean`, or the `largest`.
        """
        return self.measured(OVERALL, experiment, **_keys(of, over, metric, at, panels, statistic))

    def wins(
        self,
        experiment: str,
        of: str,
        over: str,
        panels: Sequence[str],
        at: Sequence[float | str],
        metric: str = "mean_normalized_latency_s",
    ) -> str:
        """In how many settings (panels and x) `ratio` is below 1, and in how many its whole interval is."""
        settings = [_keys(of, over, metric, x, panel) for panel in panels for x in at]
        below = sum(self.measured_number(OVERALL, experiment, **keys) < 1 for keys in settings)
        ends = [self._source.estimate({"kind": OVERALL, "experiment": experiment, **keys})["high"] for keys in settings]
        shown = sum(pd.notna(end) and end < 1 for end in ends)
        return f"{below} of {len(settings)} (in {shown} the whole interval is below 1)"

    def ratios_table(
        self,
        experiment: str,
        series: Mapping[str, str],
        over: str,
        panels: Mapping[str, str],
        metric: str = "mean_normalized_latency_s",
        at: Sequence[float | str] | float | str | None = None,
    ) -> str:
        """`ratio` of several series (columns) in several panels (rows), and in all of these.

        `series` and `panels` map the words of the table to names.
        """
        rows = [*((title, [name]) for title, name in panels.items()), ("all of these", list(panels.values()))]
        lines = [
            [title, *(self.ratio(experiment, of, over, metric, at, names) for of in series.values())]
            for title, names in rows
        ]
        return markdown(["", *series], lines)

    def value_at(self, experiment: str, panel: str, series: str, x: float | str, metric: str | None = None) -> str:
        """The mean over seeds of a metric, of the experiment's own if none is named, at x: "0.213"."""
        keys = {"panel": panel, "of": series, "x": x} | ({"metric": metric} if metric else {})
        return short(self.measured_number("value", experiment, **keys))

    def ready_table(self, experiment: str, number: int = 1) -> str:
        """One of the tables that the experiment's own step has written (results/EXPERIMENT/tables.md), from 1 on."""
        tables = self._source.ready_tables(experiment)
        if not 1 <= number <= len(tables):
            raise ConfigError(f"{experiment} has {len(tables)} tables, not a table {number}")
        return tables[number - 1]

    def _measure(self, kind: str, experiment: str, keys: Mapping[str, Any]) -> Row:
        row = self._source.estimate({"kind": kind, "experiment": experiment, **keys})
        if pd.isna(row["value"]):
            raise ConfigError(f"the measure {kind} on {experiment} with {keys} has no value")
        return row

    def _target(self, experiment: str, claim: str) -> dict[str, Any]:
        table = self._source.table("targets", experiment)
        find(table["claim"], claim, f"target of {experiment}")
        return dict(table[table["claim"] == claim].iloc[0])


def _listed(given: Sequence[Any] | float | str) -> list[Any]:
    return [given] if isinstance(given, str | float | int) else list(given)


def _keys(
    of: str,
    over: str,
    metric: str,
    at: Sequence[float | str] | float | str | None,
    panels: Sequence[str] | str | None,
    statistic: str = "geometric_mean",
) -> dict[str, Any]:
    """The keys of a measure of kind `overall`."""
    keys: dict[str, Any] = {"metric": metric, "of": of, "over": over, "statistic": statistic}
    keys |= {"at": _listed(at)} if at is not None else {}
    return keys | ({"panels": _listed(panels)} if panels is not None else {})


def _met(row: Mapping[Any, Any]) -> str:
    return {"yes": "met", "no": "**missed**"}.get(str(row["met"]), "unknown")

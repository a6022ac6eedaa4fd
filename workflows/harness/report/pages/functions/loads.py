"""Functions of a page on loads at the objective: rows of results/EXPERIMENT/capacity.csv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from fastserve.core.errors import ConfigError
from harness.report.pages.numbers import markdown, percent, short, with_interval, without_empty_columns
from harness.report.pages.source import Source, find

HELD_AGAINST = {"vllm-same-times": "vllm", "fastserve-artifact": "fastserve"}
"""Series without points of the authors' own, and the series whose points they are to meet."""
_LOADS = {"ours": "capacity", "paper": "paper_capacity", "rerun": "rerun_capacity"}


class LoadFunctions:
    """Our loads, with their intervals, and the paper's and the rerun's beside them."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def capacity(self, experiment: str, panel: str, series: str) -> str:
        """The load at the objective, with its interval: "3.24 (3.02 to 3.40)"; or that it is not crossed."""
        row = self._load(experiment, panel, series)
        return with_interval(row["capacity"], row["low"], row["high"]) or str(row["note"])

    def load(self, experiment: str, panel: str, series: str, of: str = "ours") -> float:
        """The load as a number: `ours`, the `paper`'s or the `rerun`'s."""
        find(_LOADS, of, "load")
        if of != "ours":
            series = HELD_AGAINST.get(series, series)
        value = self._load(experiment, panel, series)[_LOADS[of]]
        if pd.isna(value):
            raise ConfigError(f"{experiment}, panel {panel!r}, series {series!r} has no load of {of}")
        return float(value)

    def load_difference(self, experiment: str, panel: str, series: str, to: str = "paper") -> str:
        """Our load over the paper's or the rerun's, less 1: "+35 %"."""
        return percent(self.load(experiment, panel, series) / self.load(experiment, panel, series, to) - 1)

    def table_of(self, experiment: str, against: str | None = None, rows: str = "") -> str:
        """Loads of every panel (a row) and series (a column), with intervals, or with the distance `against` others'.

        `rows` is the header of the first column.
        """
        table = self._source.table("capacity", experiment)
        labels = dict.fromkeys(table["label"])
        lines = []
        for panel in dict.fromkeys(table["panel"]):
            own = table[table["panel"] == panel].set_index("label")
            lines.append(
                [
                    _title(own.iloc[0]),
                    *(_cell(own.loc[label], against) if label in own.index else "" for label in labels),
                ]
            )
        return markdown([rows, *labels], lines)

    def loads_table(self, experiment: str, series: Sequence[str] | None = None) -> str:
        """A row for each panel and series: the paper's load, the rerun's, ours with its interval, both distances."""
        lines, last = [], None
        for row in self._source.table("capacity", experiment).to_dict("records"):
            if series is not None and row["series"] not in series:
                continue
            title = "" if row["panel"] == last else f"{_title(row)}: {row['slo']:g}"
            last = row["panel"]
            ours = with_interval(row["capacity"], row["low"], row["high"]) or row["note"]
            theirs = [row["paper_capacity"], row["rerun_capacity"]]
            distances = [row["relative_difference"], row["rerun_difference"]]
            lines.append([title, row["label"], *map(short, theirs), ours, *map(percent, distances)])
        header = ["load (requests/s) at", "series", "paper", "rerun", "ours (95 %)", "to paper", "to rerun"]
        return without_empty_columns(header, lines)

    def rerun_table(self, experiments: Mapping[str, str]) -> str:
        """Loads beside the authors' rerun: a row for each panel and series of the last of some experiments.

        `experiments` maps the headers of our columns to them.
        """
        tables = {header: self._source.table("capacity", name) for header, name in experiments.items()}
        whole = tables[list(tables)[-1]]
        found = {header: table.set_index(["panel", "series"]) for header, table in tables.items()}
        theirs, lines, last = whole.set_index(["panel", "series"]), [], None
        for row in whole.to_dict("records"):
            place = row["panel"], row["series"]
            fitted = row["panel"], HELD_AGAINST.get(row["series"], row["series"])
            truth = theirs.loc[fitted if fitted in theirs.index else place]
            title = "" if row["panel"] == last else f"{_title(row)}: {row['slo']:g} s/token"
            last = row["panel"]
            ours = [
                _with_distance(table.loc[place], truth["rerun_capacity"]) if place in table.index else ""
                for table in found.values()
            ]
            lines.append([title, row["label"], short(truth["paper_capacity"]), short(truth["rerun_capacity"]), *ours])
        return markdown(["load (requests/s) at", "policy", "paper", "rerun", *found], lines)

    def comparison(self, experiment: str, panel: str, label: str) -> str:
        """The ratio of two series' loads, by the label of the comparison, with its interval: "2.60 (2.50 to 2.70)"."""
        table = self._source.table("comparisons", experiment)
        find(table["panel"], panel, f"panel of {experiment}")
        own = table[table["panel"] == panel]
        find(own["label"], label, f"comparison in panel {panel!r} of {experiment}")
        row = own[own["label"] == label].iloc[0]
        return with_interval(row["ratio"], row["low"], row["high"]) or str(row["note"])

    def comparisons_table(self, experiment: str) -> str:
        """A row for each comparison of loads, a column for each panel; above, what the paper and its rerun give."""
        table = self._source.table("comparisons", experiment)
        titles = {row["panel"]: _title(row) for row in table.to_dict("records")}
        lines: list[list[str]] = []
        last = None
        for label, rows in table.groupby("label", sort=False):
            own = {row["panel"]: row for row in rows.to_dict("records")}
            theirs = {
                name: [short(own[panel][ratio]) if panel in own else "" for panel in titles]
                for name, ratio in (("**paper**", "paper_ratio"), ("**rerun**", "rerun_ratio"))
            }
            held_against = [next(filter(None, ratios), "") for ratios in theirs.values()]
            if held_against != last:
                lines += [[name, *ratios] for name, ratios in theirs.items() if any(ratios)]
                last = held_against
            ours = [short(own[panel]["ratio"]) or str(own[panel]["note"]) if panel in own else "" for panel in titles]
            lines.append([str(label), *ours])
        return markdown(["load of one over another", *titles.values()], lines)

    def _load(self, experiment: str, panel: str, series: str) -> dict[str, Any]:
        table = self._source.table("capacity", experiment)
        find(table["panel"], panel, f"panel of {experiment}")
        own = table[table["panel"] == panel]
        find(own["series"], series, f"series in panel {panel!r} of {experiment}")
        return dict(own[own["series"] == series].iloc[0])


def _title(row: Mapping[Any, Any]) -> str:
    """The title of a panel: of its axis, if it stands on one."""
    return next(str(row[key]) for key in ("title", "panel_x", "panel") if not pd.isna(row.get(key)) and row[key] != "")


def _cell(row: Mapping[Any, Any], against: str | None) -> str:
    if against is None:
        return with_interval(row["capacity"], row["low"], row["high"]) or str(row["note"])
    find(_LOADS, against, "load")
    return _with_distance(row, row[_LOADS[against]])


def _with_distance(row: Mapping[Any, Any], truth: float) -> str:
    """A load and its distance from another: "4.31 (+4 %)"."""
    if pd.isna(row["capacity"]):
        return str(row["note"])
    return short(row["capacity"]) + ("" if pd.isna(truth) else f" ({percent(row['capacity'] / truth - 1)})")

"""Print the tables of docs/reproduction.md on the authors' rerun: `python tools/rerun_tables.py RESULTS`.

RESULTS is the folder in which the pipeline has written `artifact-rerun`, `artifact-rerun-kernels` and
`artifact-rerun-causes` (default: results).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from harness.analysis.files import read_table
from harness.experiments.folder import read_experiments

ROOT = Path(__file__).resolve().parents[1]
WITH, WITHOUT, CAUSES = "artifact-rerun", "artifact-rerun-kernels", "artifact-rerun-causes"
MEASURED_AS = {"vllm-same-times": "vllm", "fastserve-artifact": "fastserve"}
"""Series that the figure holds against no points of their own, and the series whose points they are to meet."""

Loads = Mapping[tuple[str, str], pd.Series]
"""Rows of a table of capacities by panel and series."""


def loads(results: Path, name: str) -> Loads:
    """The capacities of an experiment."""
    table = read_table(results / name / "capacity.csv")
    return {(row["panel"], row["series"]): row for _, row in table.iterrows()}


def cell(row: pd.Series | None, measured: float) -> str:
    """A load and its distance from the rerun's: "4.31 (+4 %)"."""
    if row is None:
        return ""
    if pd.isna(row["capacity"]):
        return str(row["note"])
    return f"{row['capacity']:.3g}" + ("" if pd.isna(measured) else f" ({row['capacity'] / measured - 1:+.0%})")


def load_table(results: Path) -> list[str]:
    """Markdown: loads of every panel and series, measured, with the kernels' times alone and with the engine's own."""
    with_time, without = loads(results, WITH), loads(results, WITHOUT)
    experiment = read_experiments(ROOT / "workflows/config/experiments")[WITH]
    lines = [
        "| load (requests/s) at | policy | paper | rerun | kernels alone | with the engine's own time |",
        "|---|---|---|---|---|---|",
    ]
    for panel in experiment.panels:
        title = f"{panel.title}: {experiment.slo_of(panel.name):g} s/token"
        for series in experiment.series:
            truth = with_time[panel.name, MEASURED_AS.get(series.name, series.name)]
            theirs = [
                "" if pd.isna(load) else f"{load:.3g}" for load in (truth["paper_capacity"], truth["rerun_capacity"])
            ]
            ours = [
                cell(table.get((panel.name, series.name)), truth["rerun_capacity"]) for table in (without, with_time)
            ]
            lines.append("| " + " | ".join([title, series.label, *theirs, *ours]) + " |")
            title = ""
    return lines


def causes_table(results: Path) -> list[str]:
    """Markdown: loads of every policy if one thing differs from the experiment."""
    table = loads(results, CAUSES)
    experiment = read_experiments(ROOT / "workflows/config/experiments")[CAUSES]
    lines = [f"| what differs | {' | '.join(series.label for series in experiment.series)} |"]
    lines.append("|---|" + "---|" * len(experiment.series))
    for panel in experiment.panels:
        rows = [table.get((panel.name, series.name)) for series in experiment.series]
        cells = ["" if row is None else cell(row, row["rerun_capacity"]) for row in rows]
        lines.append(f"| {panel.x} | {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str]) -> None:
    """Print both tables."""
    results = Path(arguments[0]) if arguments else Path("results")
    print("\n".join([*load_table(results), "", *causes_table(results)]))


if __name__ == "__main__":
    main(sys.argv[1:])

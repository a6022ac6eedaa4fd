"""Print the tables of docs/reproduction.md on the authors' rerun: `python tools/rerun_tables.py RESULTS`.

RESULTS is the folder in which the pipeline has written `artifact-rerun`, `artifact-rerun-kernels` and
`artifact-rerun-causes` (default: results).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from harness.analysis.files import read_table
from harness.experiments.folder import read_experiments

ROOT = Path(__file__).resolve().parents[1]
WITH, WITHOUT, CAUSES = "artifact-rerun", "artifact-rerun-kernels", "artifact-rerun-causes"


def loads(results: Path, name: str) -> pd.DataFrame:
    """The capacities of an experiment, by panel and series."""
    table = read_table(results / name / "capacity.csv")
    return table.set_index(["panel", "series"])


def cell(row: pd.Series) -> str:
    """A load and its distance from the rerun's: "4.48 (+8 %)"."""
    value = f"{row['capacity']:.3g}" if pd.notna(row["capacity"]) else str(row["note"])
    return value + (f" ({100 * row['rerun_difference']:+.0f} %)" if pd.notna(row["rerun_difference"]) else "")


def load_table(results: Path) -> list[str]:
    """Markdown: loads of every panel and series, measured, with the kernels' times alone and with the engine's own."""
    with_time, without = loads(results, WITH), loads(results, WITHOUT)
    experiment = read_experiments(ROOT / "workflows/config/experiments")[WITH]
    lines = [
        "| | policy | paper | rerun | kernels alone | with the engine's own time |",
        "|---|---|---|---|---|---|",
    ]
    for panel in experiment.panels:
        for series in experiment.series:
            row: Any = with_time.loc[(panel.name, series.name)]
            theirs = [f"{row[key]:.3g}" if pd.notna(row[key]) else "-" for key in ("paper_capacity", "rerun_capacity")]
            ours = [cell(table.loc[(panel.name, series.name)]) for table in (without, with_time)]
            title = (
                f"{panel.title}, {experiment.slo_of(panel.name):g} s/token" if series is experiment.series[0] else ""
            )
            lines.append("| " + " | ".join([title, series.label, *theirs, *ours]) + " |")
    return lines


def causes_table(results: Path) -> list[str]:
    """Markdown: loads of every policy if one thing differs from the experiment."""
    table = loads(results, CAUSES)
    experiment = read_experiments(ROOT / "workflows/config/experiments")[CAUSES]
    lines = [f"| what differs | {' | '.join(series.label for series in experiment.series)} |"]
    lines.append("|---|" + "---|" * len(experiment.series))
    for panel in experiment.panels:
        cells = [
            "" if panel.name in series.not_in else cell(table.loc[(panel.name, series.name)])
            for series in experiment.series
        ]
        lines.append(f"| {panel.x} | {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str]) -> None:
    """Print both tables."""
    results = Path(arguments[0]) if arguments else Path("results")
    print("\n".join([*load_table(results), "", *causes_table(results)]))


if __name__ == "__main__":
    main(sys.argv[1:])

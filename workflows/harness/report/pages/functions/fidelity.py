"""Functions of a page on real runs against their simulations, as measured on one machine: docs/tables/fidelity.csv."""

from __future__ import annotations

import pandas as pd

from harness.report.pages.numbers import markdown, percent
from harness.report.pages.source import Names, Source, find, only


class FidelityFunctions:
    """How far simulations are from real runs, in all recorded runs of a fidelity experiment."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def agreement(self, experiment: str, series: Names = None, metric: Names = None) -> str:
        """How many pairs agree, the worst, and the median error, in all recorded runs of a fidelity experiment."""
        pairs = self._pairs(experiment)
        for column, names in (("series", series), ("metric", metric)):
            pairs = only(pairs, column, names)
        worst = dict(pairs.iloc[pairs["error"].abs().argmax()])
        runs = pairs["run"].nunique()
        return (
            f"{pairs['within'].sum()} of {len(pairs)} pairs in {runs} run{'s' if runs > 1 else ''}; the worst is "
            f"{percent(worst['error'])} ({worst['label']}, load {worst['load']:g}, `{worst['metric']}`), the median "
            f"{100 * pairs['error'].abs().median():.1f} %"
        )

    def pairs_table(self, experiment: str) -> str:
        """A row for each series and load, a column for each metric: the errors in all recorded runs, worst first."""
        pairs = self._pairs(experiment)
        metrics = list(dict.fromkeys(pairs["metric"]))
        groups = []
        for (label, load), own in pairs.groupby(["label", "load"], sort=False):
            cells = [", ".join(map(percent, own[own["metric"] == metric]["error"])) for metric in metrics]
            groups.append((own["error"].abs().max(), [f"{label}, load {load:g}", *cells]))
        groups.sort(key=lambda group: -group[0])
        return markdown(
            ["errors of the simulation", *(f"`{metric}`" for metric in metrics)], [row for _, row in groups]
        )

    def _pairs(self, experiment: str) -> pd.DataFrame:
        table = self._source.fidelity()
        find(table["experiment"], experiment, "recorded fidelity experiment")
        return table[table["experiment"] == experiment]

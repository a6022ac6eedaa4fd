"""The tables that the pipeline has written, as the source of a page. What a page takes of them can be recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from fastserve.core.errors import ConfigError
from harness.analysis.against_itself import shares
from harness.analysis.files import read_json, read_table
from harness.analysis.measures import Evidence, Measure, NoMeasure
from harness.analysis.points import load_reported
from harness.analysis.targets import targets_table
from harness.experiments.experiment import Experiment, Target
from harness.experiments.files import Keys, parse_as
from harness.report.captions import short_commit
from harness.report.pages.source import AGAINST_ITSELF, MEASURES, OVERALL, TABLES, Row, find, key_of, tables_in


class _Measured(Keys):
    """A measure alone, so that its errors are told as those of a file are."""

    measure: Measure


class Results:
    """The tables in `folder`, of `experiments`; `plotted` are the files of the paper's points and of the rerun's.

    `recorded_fidelity` is the table of what was measured on this project's machine: no pipeline repeats it alike.
    """

    def __init__(
        self,
        folder: Path,
        experiments: Mapping[str, Experiment],
        plotted: tuple[Path, Path],
        recorded_fidelity: pd.DataFrame,
    ) -> None:
        self._folder = folder
        self._experiments = experiments
        self._plotted = plotted
        self._fidelity = recorded_fidelity
        self._evidence: dict[str, Evidence] = {}
        self.taken: dict[str, dict[str, pd.DataFrame]] = {name: {} for name in (*TABLES, MEASURES, AGAINST_ITSELF)}
        """What pages have asked for: tables by experiment, and a row for each measure."""
        self.taken_texts: dict[str, str] = {}
        """The same of tables that are ready, by experiment."""

    @cached_property
    def provenance(self) -> str:
        """Commits, seeds and core of the runs behind the claims, in a sentence."""
        claims = self.claims()
        names = [name for name in claims["experiment"].dropna().unique() if name in self._experiments]
        made_by = [each for name in names for each in read_json(self._folder / name / "provenance.json")]
        commits = dict.fromkeys(short_commit(each["commit"]) for each in made_by)
        cores = dict.fromkeys(each.get("core", "unknown") for each in made_by)
        by_seeds = claims["num_seeds"].dropna().astype(int).value_counts().sort_index(ascending=False)
        seeds = [f"{count} ({claims} claims)" for count, claims in by_seeds.items()]
        return f"Commit {', '.join(commits)}; seeds a claim: {', '.join(seeds)}; {', '.join(cores)} core."

    def claims(self) -> pd.DataFrame:
        """See `Source`."""
        return self._table(self._folder / "headline" / "claims.csv")

    def table(self, name: str, experiment: str) -> pd.DataFrame:
        """See `Source`."""
        if experiment not in self.taken[name]:
            find(self._experiments, experiment, "experiment")
            table = self._table(self._folder / experiment / f"{name}.csv").assign(experiment=experiment)
            titles = {panel.name: panel.title or str(panel.x or "") for panel in self._experiments[experiment].panels}
            self.taken[name][experiment] = table.assign(title=table["panel"].map(titles))
        return self.taken[name][experiment]

    def against_itself(self) -> pd.DataFrame:
        """See `Source`."""
        if not self.taken[AGAINST_ITSELF]:
            table = self._table(self._folder / "headline" / f"{AGAINST_ITSELF}.csv")
            self.taken[AGAINST_ITSELF] = {"": shares(table)}
        return self.taken[AGAINST_ITSELF][""]

    def estimate(self, measure: Mapping[str, Any]) -> Row:
        """See `Source`."""
        key = key_of(measure)
        if key not in self.taken[MEASURES]:
            row = {"measure": key, **self._estimate(measure)}
            self.taken[MEASURES][key] = pd.DataFrame([row])
        return dict(self.taken[MEASURES][key].iloc[0])

    def ready_tables(self, experiment: str) -> list[str]:
        """See `Source`."""
        if experiment not in self.taken_texts:
            find(self._experiments, experiment, "experiment")
            path = self._folder / experiment / "tables.md"
            self._require(path)
            self.taken_texts[experiment] = path.read_text(encoding="utf-8")
        return tables_in(self.taken_texts[experiment])

    def fidelity(self) -> pd.DataFrame:
        """See `Source`."""
        return self._fidelity

    def _estimate(self, measure: Mapping[str, Any]) -> dict[str, Any]:
        find(self._experiments, measure["experiment"], "experiment")
        on = self._evidence_of(measure["experiment"])
        if measure["kind"] == OVERALL:
            keys = {key: value for key, value in measure.items() if key not in ("kind", "experiment")}
            target = parse_as(Target, {"claim": OVERALL, "at_most": 1, **keys}, "ratio")
            self._require_names(on.experiment, series=(target.of, target.over), panels=target.panels or ())
            (row,) = targets_table(on.experiment.model_copy(update={"targets": (target,)}), on.points).to_dict(
                "records"
            )
            return {end: row[end] for end in ("value", "low", "high")}
        parsed = parse_as(_Measured, {"measure": dict(measure)}, "measured").measure
        if isinstance(parsed, NoMeasure):
            raise ConfigError("measured: kind 'none' measures nothing")
        sides = [side for side in (parsed.of, getattr(parsed, "over", None)) if side is not None]
        panels = [parsed.panel] if parsed.panel is not None else []
        self._require_names(on.experiment, series=sides, panels=panels)
        estimate = parsed.estimate(on)
        return {"value": estimate.value, "low": estimate.low, "high": estimate.high}

    def _evidence_of(self, name: str) -> Evidence:
        if name not in self._evidence:
            experiment, points = self._experiments[name], self._table(self._folder / name / "points.csv")
            self._evidence[name] = Evidence(experiment, points, load_reported(*self._plotted, experiment))
        return self._evidence[name]

    @staticmethod
    def _require_names(experiment: Experiment, series: Iterable[str], panels: Iterable[str]) -> None:
        for names, known, what in (
            (series, experiment.series, "series"),
            (panels, experiment.panels, "panel"),
        ):
            for name in names:
                find([each.name for each in known], name, f"{what} in {experiment.title!r}")

    def _table(self, path: Path) -> pd.DataFrame:
        self._require(path)
        return read_table(path)

    @staticmethod
    def _require(path: Path) -> None:
        if not path.exists():
            raise ConfigError(f"there is no {path}; run `make reproduce` first")

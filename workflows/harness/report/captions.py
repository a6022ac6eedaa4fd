"""Captions: the provenance below a figure, and the findings in the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fastserve.latency import EngineTime, load_profile
from fastserve.latency.outside_range import as_percent
from harness.analysis.pairs import BOUND
from harness.experiments.experiment import Experiment
from harness.experiments.points import points_of
from harness.report.plots.style import metric_label
from harness.run.profile_range import BOUNDS_LEFT, SHARE
from harness.studies.measured.replay import replays_of


def provenance_caption(
    experiment: Experiment, metas: Sequence[Mapping[str, Any]], points: pd.DataFrame | None = None
) -> str:
    """Describe an experiment's runs, from their meta.json: requests, seeds, profile or machine, note, commit.

    With the table of points, say how much of the time lies outside the range that a profile was measured in.
    """
    seeds = experiment.seeds
    configs = [point.config for point in points_of(experiment)]
    counts = sorted(
        {config.num_requests for config in configs}
        or {point.num_requests for point in experiment.points or () if point.num_requests}
    )
    requests = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    text = [f"{requests} requests a point, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}."]
    if len(seeds) > 1:
        text.append("Mean over seeds; bands and bars are 95 % intervals (jackknife-t).")
    profiles = list(dict.fromkeys(config.profile for config in configs if config.profile))
    if profiles:
        hardware = dict.fromkeys(load_profile(name).hardware for name in profiles)
        text.append(f"Simulated with the iteration times of {', '.join(profiles)} ({', '.join(hardware)}).")
    text += _outside_range(points)
    if experiment.backend != "sim":
        text.append(f"Measured on {', '.join(dict.fromkeys(_machine(meta) for meta in metas))}.")
    text += [experiment.note] if experiment.note else []
    commits = dict.fromkeys(short_commit(meta.get("commit")) for meta in metas)
    text.append(f"Commit {', '.join(commits) or 'unknown'}.")
    return " ".join(text)


def _outside_range(points: pd.DataFrame | None) -> list[str]:
    """Say how much of the runs' time lies outside their profiles' range, and which bounds were left."""
    if points is None or SHARE not in points:
        return []
    outside = points[points[SHARE].astype(float) > 0]
    if outside.empty:
        return []
    names = dict.fromkeys(name for names in outside[BOUNDS_LEFT] for name in names.split())
    bounds = ", ".join(name.replace("_", " ") for name in names)
    return [
        f"Outside the range that the profile holds for ({bounds}), and extrapolated: up to "
        f"{as_percent(float(outside[SHARE].max()))} of a run's computed time."
    ]


def agreement_caption(pairs: pd.DataFrame) -> str:
    """Name the worst pair of a table of `pairs_of`, how many pairs agree, and the median error."""
    worst = pairs.iloc[0]
    run = [worst["label"], *(f"{name} {worst[name]:g}" for name in ("load", "seed") if name in pairs)]
    metric = metric_label(worst["metric"]).partition(" (")[0]
    metric = metric if metric[0] == "P" else metric[0].lower() + metric[1:]
    error = "no value in one of the two" if pd.isna(worst["error"]) else f"{worst['error']:+.1%}"
    return (
        f"Worst pair: {', '.join(run)}, {metric}: {error}. {pairs['within'].sum()} of {len(pairs)} pairs (each metric "
        f"of each run) are within {BOUND:.0%}; the median error is {pairs['error'].abs().median():.1%}."
    )


def recorded_caption(table: pd.DataFrame, metas: Sequence[Mapping[str, Any]]) -> str:
    """Describe recorded runs, from their table and their meta.json: model, requests, machine, date, commit."""
    counts, run = table["num_requests"], metas[0]["configuration"]
    machines = dict.fromkeys(_machine(meta) for meta in metas)
    commits = dict.fromkeys(short_commit(meta.get("commit")) for meta in metas)
    dates = sorted(meta["created_at"][:10] for meta in metas)
    return " ".join(
        [
            f"{run['model']} in {run['dtype']}, {len(table)} runs of {counts.min()} to {counts.max()} requests.",
            f"Measured on {', '.join(machines)}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))},",
            f"at commit {', '.join(commits)}.",
            "Simulated: the same requests, with the iteration times measured beside the runs.",
        ]
    )


def truth_caption(
    experiment: Experiment, metas: Sequence[Mapping[str, Any]], points: pd.DataFrame | None = None
) -> str:
    """Describe measured runs and their simulations: engine, limits, source; profile, and the engine's own time."""
    replays = list(replays_of(experiment))
    runs = [measured for _, measured in replays]
    text = [f"Measured by others on {run.gpu}: {run.engine}, {run.model}, {run.limits}." for run in runs]
    text.append(f"Source: {'; '.join(dict.fromkeys(run.source for run in runs))}.")
    for profile in (load_profile(point.config.profile or "") for point, _ in replays):
        text.append(f"{profile.name}: the engine's own time is {_own_time(profile.engine_time)}.")
    text.append(
        "Batch and cache of both are reconstructed from the times of requests, which do not show preemptions: a "
        "preempted request counts all the same. How often the real engine preempted is not recorded."
    )
    repeated = None if points is None else points[points["series"] == experiment.over]
    return f"{' '.join(text)} {provenance_caption(experiment, metas, repeated)}"


def would_have_caption(
    experiment: Experiment, metas: Sequence[Mapping[str, Any]], points: pd.DataFrame | None = None
) -> str:
    """Describe the simulations of other policies on the machines of measured runs."""
    links = []
    for profile in (load_profile(point.config.profile or "") for point, _ in replays_of(experiment)):
        link = profile.host_link
        links.append(f"{link.bandwidth_bytes_per_s / 1e9:g} GB/s ({profile.name})")
    return (
        "SIMULATED, but for the hatched bars: the same requests, batch limit, token budget and cache as in the "
        f"measured run. Policies that swap move caches over a host link of {', '.join(links)}, which no measured run "
        f"has used. The simulator's error is known for vLLM alone. {provenance_caption(experiment, metas, points)}"
    )


def _own_time(time: EngineTime) -> str:
    """An engine's own time in words."""
    parts = {"an iteration": time.per_iteration_s, "a request": time.per_request_s, "a token": time.per_token_s}
    said = [f"{1e3 * seconds:.3g} ms {of}" for of, seconds in parts.items() if seconds]
    return f"{time.source}, {' and '.join(said)}" if said else "not modelled"


def findings(claims: pd.DataFrame, itself: pd.DataFrame) -> dict[str, str]:
    """Map each experiment to the verdicts on the claims that it measures, as reStructuredText.

    `itself` (`harness.analysis.against_itself.shares`) adds how often its series differ from themselves.
    """
    texts: dict[str, str] = {}
    for experiment, rows in claims.dropna(subset=["experiment"]).groupby("experiment", sort=False):
        lines = []
        row: Any
        for row in rows.itertuples():
            line = f"* {row.claim}: **{three_digits(row.value) or 'unknown'}**{_interval(row)}"
            if pd.notna(row.paper_low):
                line += f", the paper {claimed(row)}: *{row.verdict}*"
                if isinstance(row.tuned, str):
                    line += f" (tuned on these points: {row.tuned})"
            lines.append(f"{line}. {row.reason if isinstance(row.reason, str) else ''}".rstrip())
        lines += [f"* {line}" for line in false_alarms(itself[itself["experiment"] == experiment])]
        texts[str(experiment)] = "\n".join(lines)
    return texts


def false_alarms(itself: pd.DataFrame) -> list[str]:
    """Say how often series differ from themselves: a sentence for each number of seeds."""
    total = itself.groupby("seeds_a_side")[["comparisons", "wins", "wins_adjusted"]].sum()
    lines = []
    row: Any
    for row in total.itertuples():
        plain, adjusted = (f"{100 * wins / row.comparisons:.1f} %" for wins in (row.wins, row.wins_adjusted))
        lines.append(
            f"A series against itself, {row.Index} seeds a side: {plain} of {row.comparisons:,} intervals show a "
            f"difference (5 % should), and {adjusted} do after adjustment for their number."
        )
    return lines


class Finding:
    """The finding of an experiment. It is read when the report is made, since the verdicts come after the figures."""

    def __init__(self, experiment: str, captions: str) -> None:
        self.experiment, self.captions = experiment, captions

    def __repr__(self) -> str:
        """Give a text that is independent of the finding, since Snakemake repeats a step whose parameters change."""
        return f"Finding({self.experiment!r})"

    def text(self) -> str:
        """The finding as reStructuredText; empty if the experiment measures no claim."""
        path = Path(self.captions)
        return json.loads(path.read_text(encoding="utf-8")).get(self.experiment, "") if path.exists() else ""


def _interval(row: Any) -> str:
    return "" if pd.isna(row.low) else f" ({span(row.low, row.high)})"


def claimed(row: Any) -> str:
    """The paper's value or range in a row of the table of claims; empty for a finding beyond the paper."""
    if pd.isna(row.paper_low) or row.paper_low == row.paper_high:
        return three_digits(row.paper_low)
    return span(row.paper_low, row.paper_high)


def span(low: float, high: float) -> str:
    """Format an interval of the table of claims; a missing one is empty, and an infinite end is open."""
    return "" if pd.isna(low) else f"{three_digits(low)} to {three_digits(high)}"


def three_digits(value: float) -> str:
    """Format a number of the table of claims; a missing number is empty."""
    return "" if pd.isna(value) else f"{value:.3g}"


def _machine(meta: Mapping[str, Any]) -> str:
    hardware = meta.get("hardware", {})
    threads = hardware.get("torch_threads")
    count = f", {threads} thread{'s' if threads != 1 else ''}" if threads else ""
    name = hardware.get("gpu") if "gpu" in hardware else hardware.get("cpu") or "an unknown processor"
    return f"{name} ({hardware.get('cores', '?')} cores{count})"


def short_commit(commit: str | None) -> str:
    """The first ten digits of a commit, and whether the code had changes."""
    if not commit:
        return "unknown"
    digits, _, dirty = commit.partition("-")
    return digits[:10] + (" with changes" if dirty else "")

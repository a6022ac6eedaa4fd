"""What is written below a figure: where it comes from; and in the report: what was found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fastserve.latency import load_profile
from harness.experiments.experiments import Experiment, points_of


def provenance_caption(experiment: Experiment, metas: Sequence[Mapping[str, Any]]) -> str:
    """Workloads, seeds, whose iteration times or which machine, the note, the commit; from the runs' meta.json."""
    seeds = experiment["seeds"]
    configs = [point.config for point in points_of(experiment)]
    counts = sorted(
        {config.num_requests for config in configs} or {point["num_requests"] for point in experiment["points"]}
    )
    requests = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    text = [f"{requests} requests a point, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}."]
    if len(seeds) > 1:
        text.append("Mean over seeds; bands and bars are 95 % bootstrap intervals.")
    profiles = list(dict.fromkeys(config.profile for config in configs if config.profile))
    if profiles:
        hardware = dict.fromkeys(load_profile(name).hardware for name in profiles)
        text.append(f"Simulated with the iteration times of {', '.join(profiles)} ({', '.join(hardware)}).")
    if experiment["backend"] != "sim":
        text.append(f"Really run on {', '.join(dict.fromkeys(_machine(meta) for meta in metas))}.")
    text += [experiment["note"]] if experiment["note"] else []
    commits = dict.fromkeys(_short(meta.get("commit")) for meta in metas)
    text.append(f"Commit {', '.join(commits) or 'unknown'}.")
    return " ".join(text)


def recorded_caption(table: pd.DataFrame, metas: Sequence[Mapping[str, Any]]) -> str:
    """What recorded runs are and which machine and code made them, from their table and their meta.json."""
    counts, run = table["num_requests"], metas[0]["configuration"]
    machines = dict.fromkeys(_machine(meta) for meta in metas)
    commits = dict.fromkeys(_short(meta.get("commit")) for meta in metas)
    dates = sorted(meta["created_at"][:10] for meta in metas)
    return " ".join(
        [
            f"{run['model']} in {run['dtype']}, {len(table)} runs of {counts.min()} to {counts.max()} requests.",
            f"Measured on {', '.join(machines)}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))},",
            f"at commit {', '.join(commits)}.",
            "Simulated: the same requests, with the iteration times measured beside the runs.",
        ]
    )


def findings(claims: pd.DataFrame) -> dict[str, str]:
    """By experiment, the verdicts on the claims measured on it, as reStructuredText."""
    texts: dict[str, str] = {}
    for experiment, rows in claims.dropna(subset=["experiment"]).groupby("experiment", sort=False):
        lines = []
        row: Any
        for row in rows.itertuples():
            line = f"* {row.claim}: **{three_digits(row.value) or 'unknown'}**{_interval(row)}"
            if pd.notna(row.paper_low):
                line += f", the paper {claimed(row)}: *{row.verdict}*"
            lines.append(f"{line}. {row.reason if isinstance(row.reason, str) else ''}".rstrip())
        texts[str(experiment)] = "\n".join(lines)
    return texts


class Finding:
    """The finding of an experiment, read when it is printed: a report is made after the claims have been weighed."""

    def __init__(self, experiment: str, captions: str) -> None:
        self.experiment, self.captions = experiment, captions

    def __repr__(self) -> str:
        """The same whatever was found, since Snakemake repeats a step whose parameters change."""
        return f"Finding({self.experiment!r})"

    def text(self) -> str:
        """reStructuredText; empty if no claim is measured on the experiment."""
        path = Path(self.captions)
        return json.loads(path.read_text(encoding="utf-8")).get(self.experiment, "") if path.exists() else ""


def _interval(row: Any) -> str:
    return "" if pd.isna(row.low) else f" ({three_digits(row.low)} to {three_digits(row.high)})"


def claimed(row: Any) -> str:
    """What the paper claims, of a row of the table of claims: a value or a range; empty for a finding of our own."""
    if pd.isna(row.paper_low) or row.paper_low == row.paper_high:
        return three_digits(row.paper_low)
    return f"{three_digits(row.paper_low)} to {three_digits(row.paper_high)}"


def three_digits(value: float) -> str:
    """A number of the table of claims; empty where there is none."""
    return "" if pd.isna(value) else f"{value:.3g}"


def _machine(meta: Mapping[str, Any]) -> str:
    hardware = meta.get("hardware", {})
    threads = hardware.get("torch_threads")
    count = f", {threads} thread{'s' if threads != 1 else ''}" if threads else ""
    name = hardware.get("gpu") if "gpu" in hardware else hardware.get("cpu") or "an unknown processor"
    return f"{name} ({hardware.get('cores', '?')} cores{count})"


def _short(commit: str | None) -> str:
    """A commit's first ten digits, and its -dirty."""
    if not commit:
        return "unknown"
    digits, _, dirty = commit.partition("-")
    return digits[:10] + (" with changes" if dirty else "")

"""Figures of experiments, in one style. Only measured points are drawn: nothing is smoothed, extended or left out."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from fastserve.files import written_whole
from fastserve.latency import load_profile
from harness.capacity import is_monotone, largest_fall
from harness.points import Experiment, capacity_of, curve

# Okabe and Ito's colours, which those with a colour vision deficiency tell apart, and a marker beside each.
_STYLES = {
    "fastserve": ("#0072B2", "o"),
    "fastserve-fcfs": ("#E69F00", "s"),
    "vllm": ("#009E73", "^"),
    "vllm-chunked": ("#56B4E9", "v"),
    "mlfq": ("#CC79A7", "D"),
    "fastserve-artifact": ("#D55E00", "P"),
    "fixed-priority": ("#8C6D1F", "X"),
    "srpt": ("#000000", "*"),
    "orca": ("#7A5195", "<"),
    "run-to-completion": ("#7F7F7F", "p"),
}
_OTHERS = [("#A6761D", "h"), ("#666666", "d"), ("#1B9E77", ">"), ("#E7298A", "H")]
_DASHES = ((4.0, 2.0), (1.0, 1.5), (6.0, 2.0, 1.0, 2.0))
_LOG_FROM_RATIO = 20.0
_UNITS = {"jct_s": "s", "normalized_latency_s": "s/token", "ttft_s": "s", "tpot_s": "s/token", "max_token_gap_s": "s"}
_QUANTITIES = {
    "jct_s": "job completion time",
    "normalized_latency_s": "normalized latency",
    "ttft_s": "time to first token",
    "tpot_s": "time per output token",
    "max_token_gap_s": "longest gap between tokens",
}
_STYLE: Any = {
    "axes.titlesize": 16,
    "axes.titleweight": "bold",
    "axes.labelsize": 14,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "legend.fontsize": 12,
    "grid.color": "#E3E3E3",
    "axes.edgecolor": "#555555",
    "pdf.fonttype": 42,
    "font.family": "DejaVu Sans",
}


def draw(
    experiment: Experiment,
    points: pd.DataFrame,
    reported: pd.DataFrame,
    metas: Sequence[Mapping[str, Any]],
    stem: Path,
) -> list[Path]:
    """Draw the experiment's figure to `stem`.png and `stem`.pdf and return the two paths.

    `points` and `reported` are tables of `harness.points`; `metas` are the meta.json of the points, for the caption.
    """
    with sns.axes_style("whitegrid", rc=_STYLE), matplotlib.rc_context(_STYLE):
        if experiment["kind"] == "sim":
            figure, notes = _draw_load(experiment, points, reported)
        else:
            figure, notes = _draw_bars(experiment, points)
        _write_below(figure, [*notes, *failures(points)], caption(experiment, metas))
        return _save(figure, stem)


def policy_style(policy: str, others: Sequence[str] = ()) -> tuple[str, str]:
    """Colour and marker of a policy: always the same for those known here, by its place among `others` else."""
    if policy in _STYLES:
        return _STYLES[policy]
    unknown = [other for other in dict.fromkeys(others) if other not in _STYLES]
    return _OTHERS[unknown.index(policy) % len(_OTHERS) if policy in unknown else 0]


def metric_label(metric: str) -> str:
    """`p95_ttft_s` as "P95 time to first token (s)"."""
    statistic, _, quantity = metric.partition("_")
    name = "Mean" if statistic == "mean" else statistic.upper()
    return f"{name} {_QUANTITIES[quantity]} ({_UNITS[quantity]})"


def caption(experiment: Experiment, metas: Sequence[Mapping[str, Any]]) -> str:
    """Where the figure comes from: workload, seeds, what it ran on, commit."""
    counts = sorted({point["num_requests"] for point in experiment["points"]})
    requests = f"{counts[0]} to {counts[-1]} requests" if len(counts) > 1 else f"{counts[0]} requests"
    seeds = experiment["seeds"]
    text = [
        f"Trace {experiment['trace']}, {experiment['arrivals']} arrivals, {requests} a point, "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}."
    ]
    if len(seeds) > 1:
        shown = "bands" if experiment["kind"] == "sim" else "whiskers"
        text.append(f"Mean over seeds; {shown} from the lowest to the highest.")
    if experiment["kind"] == "sim":
        names = list(dict.fromkeys(series["profile"] for series in experiment["series"]))
        hardware = dict.fromkeys(load_profile(name).hardware for name in names)
        text.append(f"Simulated from measured iteration times: {', '.join(names)} ({', '.join(hardware)}).")
    else:
        text.append(f"Really run on {', '.join(dict.fromkeys(_machine(meta) for meta in metas))}.")
    if experiment["note"]:
        text.append(experiment["note"])
    commits = dict.fromkeys(_short(meta.get("commit")) for meta in metas)
    text.append(f"Commit {', '.join(commits) or 'unknown'}.")
    return " ".join(text)


def failures(points: pd.DataFrame) -> list[str]:
    """A note for each series that lost requests: its latencies are of the others only."""
    lost = points[points["failed"] > 0].groupby("label", sort=False)[["failed", "num_requests"]].sum()
    return [f"{label}: {row.failed} of {row.num_requests} requests failed" for label, row in lost.iterrows()]


def _draw_load(experiment: Experiment, points: pd.DataFrame, reported: pd.DataFrame) -> tuple[Figure, list[str]]:
    metric, slo = experiment["metric"], experiment["slo"]
    policies = [series["policy"] for series in experiment["series"]]
    figure = Figure(figsize=(12, 6.75))
    axes = figure.add_axes((0.075, 0.235, 0.6, 0.69))
    ours, theirs, falls, their_falls = [], [], [], []
    num_variants = 0
    for series in experiment["series"]:
        color, marker = policy_style(series["policy"], policies)
        line = curve(points, series["name"], metric)
        dashes: tuple[float, ...] = ()
        if series["variant"]:
            dashes = _DASHES[num_variants % len(_DASHES)]
            num_variants += 1
        style: dict[str, Any] = {
            "color": color,
            "marker": marker,
            "markersize": 8 if not dashes else 6,
            "linewidth": 2.2,
        }
        style |= {"linestyle": (0, dashes) if dashes else "-", "markeredgecolor": "white", "markeredgewidth": 0.8}
        axes.plot(line.rates, line.mean, zorder=3, **style)
        if len(experiment["seeds"]) > 1:
            axes.fill_between(line.rates, line.low, line.high, color=color, alpha=0.18, linewidth=0, zorder=2)
        ours.append(Line2D([], [], label=_with_capacity(series["label"], line.rates, line.mean, slo), **style))
        if not is_monotone(line.mean):
            falls.append(f"{series['label']} (by up to {_percent(largest_fall(line.mean))})")
        paper = reported[reported["system"] == series["paper_system"]]
        if len(paper):
            hollow: dict[str, Any] = {"color": color, "marker": marker, "markersize": 9, "linestyle": "none"}
            hollow |= {"markerfacecolor": "none", "markeredgewidth": 1.8}
            axes.plot(paper["rate"], paper["value"], zorder=4, **hollow)
            label = _with_capacity(series["paper_system"], paper["rate"].to_numpy(), paper["value"].to_numpy(), slo)
            theirs.append(Line2D([], [], label=label, **hollow))
            if not is_monotone(paper["value"]):
                their_falls.append(f"{series['paper_system']} (by up to {_percent(largest_fall(paper['value']))})")

    if slo is not None:
        axes.axhline(slo, color="#444444", linestyle=(0, (6, 3)), linewidth=1.4, zorder=1)
    shown = np.concatenate([line.get_ydata() for line in axes.lines if line.get_linestyle()] or [np.array([])])
    _scale(axes, np.asarray(shown, dtype=float))
    axes.set_title(experiment["title"], loc="left", pad=12)
    axes.set_xlabel("Request rate (requests/s)")
    axes.set_ylabel(metric_label(metric))
    axes.set_xlim(left=min(0, axes.get_xlim()[0]))
    sns.despine(ax=axes)

    legends = [("Ours, simulated", ours)]
    if theirs:
        legends.append(("Reported by the paper", theirs))
    if slo is not None:
        unit = _UNITS[metric.partition("_")[2]]
        label = f"SLO: {slo:g} {unit}\n(numbers: requests/s where\na curve first exceeds it)"
        legends.append(("", [Line2D([], [], color="#444444", linestyle=(0, (6, 3)), linewidth=1.4, label=label)]))
    _stack_legends(figure, legends, left=0.69, top=0.93)
    notes = []
    if falls:
        notes.append(f"Not monotone, ours: {', '.join(falls)} falls as the rate rises")
    if their_falls:
        notes.append(f"Not monotone, the paper's: {', '.join(their_falls)}")
    return figure, notes


def _draw_bars(experiment: Experiment, points: pd.DataFrame) -> tuple[Figure, list[str]]:
    panels = {
        "mean_normalized_latency_s": ("Mean normalized latency", "ms/token", 1000),
        "p95_normalized_latency_s": ("P95 normalized latency", "ms/token", 1000),
        "output_tokens_per_s": ("Throughput", "Output tokens/s", 1),
    }
    engine, series = experiment["engine"], experiment["series"]
    policies = [each["policy"] for each in series]
    machine = "this CPU" if engine.get("device", "cpu") == "cpu" else "this GPU"
    figure = Figure(figsize=(12, 6.0))
    width = 0.8 / len(series)
    handles: dict[str, Any] = {}
    for i, (metric, (title, unit, scale)) in enumerate(panels.items()):
        axes = figure.add_axes((0.07 + 0.33 * i, 0.235, 0.25, 0.49))
        for j, each in enumerate(series):
            line = curve(points, each["name"], metric)
            low, mean, high = (scale * values for values in (line.low, line.mean, line.high))
            bars = axes.bar(
                np.arange(len(mean)) + (j - (len(series) - 1) / 2) * width,
                mean,
                width * 0.92,
                color=policy_style(each["policy"], policies)[0],
                hatch="//" if each["variant"] else None,
                edgecolor="white",
                yerr=np.array([mean - low, high - mean]) if len(experiment["seeds"]) > 1 else None,
                zorder=2,
            )
            axes.bar_label(bars, [_three_digits(value) for value in mean], padding=2, fontsize=10.5)
            handles.setdefault(each["label"], bars)
        axes.set_title(title, fontsize=13.5, fontweight="normal", loc="left")
        axes.set_ylabel(unit, fontsize=12.5)
        axes.set_xticks(np.arange(len(line.rates)), [f"{rate:g}" for rate in line.rates])
        axes.set_xlabel("Request rate (requests/s)", fontsize=12.5)
        axes.margins(y=0.14)
        axes.set_xlim(-0.6, len(line.rates) - 0.4)
        axes.grid(axis="x", visible=False)
        sns.despine(ax=axes)
    title = f"{experiment['title']}: {engine['model']} on {machine}"
    figure.text(0.02, 0.96, title, fontsize=16, fontweight="bold", va="top")
    remark = "Absolute times are this machine's: only the ratios between policies are meaningful"
    figure.text(0.02, 0.9, remark, fontsize=13, va="top")
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="upper left",
        bbox_to_anchor=(0.013, 0.865),
        ncols=len(handles),
        frameon=False,
    )
    if not points["preemptions"].any():
        return figure, ["No request was preempted at these rates: the figure shows no effect of preemption"]
    return figure, []


def _scale(axes: Axes, values: np.ndarray) -> None:
    """Log y where the values span much; ticks at 1, 2 and 5 then, since decades alone are too few to read from."""
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values) or values.max() / values.min() < _LOG_FROM_RATIO:
        axes.set_ylim(bottom=0)
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(values.min() / 1.3, values.max() * 1.3)


def _stack_legends(figure: Figure, legends: Sequence[tuple[str, list[Line2D]]], left: float, top: float) -> None:
    """Legends under their titles, one below the other, right of the axes."""
    canvas = FigureCanvasAgg(figure)
    for title, handles in legends:
        legend = figure.legend(
            handles=handles,
            title=title or None,
            loc="upper left",
            bbox_to_anchor=(left, top),
            frameon=False,
            alignment="left",
            labelspacing=0.55,
            borderpad=0.2,
            title_fontproperties={"weight": "bold", "size": 12.5},
        )
        top -= legend.get_window_extent(canvas.get_renderer()).height / figure.bbox.height + 0.035


def _with_capacity(label: str, rates: np.ndarray, values: np.ndarray, slo: float | None) -> str:
    """The label and the rate at which the curve exceeds the SLO."""
    if slo is None:
        return label
    rate, _ = capacity_of(rates, values, slo)
    return "\n".join(textwrap.wrap(f"{label}: {'does not' if rate is None else f'{rate:.2f}'}", 32))


def _write_below(figure: Figure, notes: Sequence[str], text: str) -> None:
    """Notes, then the caption, under the axes."""
    lines = [line for note in notes for line in textwrap.wrap(f"⚑ {note}", 135, subsequent_indent="    ")]
    below = textwrap.wrap(text, 148)
    step = 0.18 / figure.get_figheight()
    bottom = 0.08 / figure.get_figheight() + step * (len(below) - 1)
    for i, line in enumerate(below):
        figure.text(0.02, bottom - i * step, line, fontsize=10, color="#555555", va="bottom")
    bottom += step * 1.25
    for i, line in enumerate(reversed(lines)):
        figure.text(0.02, bottom + i * step * 1.1, line, fontsize=11, color="#8A1C1C", va="bottom")


def _save(figure: Figure, stem: Path) -> list[Path]:
    """Both files are drawn before either takes its place."""
    png, pdf = (stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf"))
    with written_whole(png) as staged_png, written_whole(pdf) as staged_pdf:
        figure.savefig(staged_png, dpi=160)
        figure.savefig(staged_pdf, metadata={"CreationDate": None})
    return [png, pdf]


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


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "<1 %"


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".") if value < 100 else f"{value:.0f}"

"""Figures show what the tables hold: every point, no others, at its place, and readable."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from fastserve.core.errors import ConfigError, OutputError
from harness.analysis.intervals import mean_estimate, ratio_of_means
from harness.report.plots import KINDS, draw, figure_of, flags_of, headline_of
from harness.report.plots.elements import XAxis, capacity_text
from harness.report.plots.ratios import LIMITS
from harness.report.plots.style import (
    PARTS,
    POLICIES,
    bound,
    metric_label,
    policy_style,
    scale_y,
    series_styles,
)
from harness.report.plots.tables import Tables

LATENCY = "mean_normalized_latency_s"
SERIES = [
    {"name": "vllm", "label": "vLLM", "policy": "vllm", "paper_system": "vLLM", "variant": False},
    {"name": "fcfs", "label": "FastServe-FCFS", "policy": "fastserve-fcfs", "paper_system": None, "variant": False},
    {"name": "fastserve", "label": "FastServe", "policy": "fastserve", "paper_system": "FastServe", "variant": False},
    {"name": "reactive", "label": "FastServe, reactive", "policy": "fastserve", "paper_system": None, "variant": True},
]
PANELS = [{"name": "a", "title": "OPT-13B, ShareGPT", "x": 16}, {"name": "b", "title": "OPT-66B, Alpaca", "x": 64}]
NO_PAPER = pd.DataFrame({"panel": [], "source": [], "system": [], "rate": [], "value": []})
REPORTED = pd.DataFrame(
    {"panel": "a", "source": "paper", "system": "vLLM", "rate": [3.0, 0.5, 1.0], "value": [5.0, 0.01, 0.02]}
)


def make_experiment(figure, **given):
    base = {"title": "A figure", "note": "", "figure": figure, "backend": "sim", "metric": LATENCY, "slo": 0.3}
    return base | {"panels": PANELS[:1], "series": SERIES} | given


def make_points(experiment, xs=(0.5, 1.0, 2.0, 4.0), seeds=(0, 1, 2)):
    rng = np.random.default_rng(3)
    rows = []
    for panel, series, (i, x), seed in itertools.product(
        experiment["panels"], experiment["series"], enumerate(xs), seeds
    ):
        latency = 0.02 * 4**i * rng.uniform(0.8, 1.2)
        row = {"panel": panel["name"], "series": series["name"], "label": series["label"], "policy": series["policy"]}
        row |= {"x": x, "rate": i + 1.0, "num_requests": 50, "seed": seed, "failed": 0, "preemptions": 7}
        row |= {LATENCY: latency, "p95_normalized_latency_s": 3 * latency, "output_tokens_per_s": 100.0 * latency}
        row |= {"mean_queueing_s": 90 * latency, "mean_swapping_s": 0.4 * latency, "mean_execution_s": 9.0}
        row |= {f"slo_attainment_{k}": math.exp(-latency / float(k)) for k in ("0.5", "1", "2")}
        row |= {f"slowdown_decile_{d}": 1 + latency * d for d in range(1, 11)} | {"swap_out_bytes": 1e9 * i}
        rows.append(row)
    return pd.DataFrame(rows)


def make_capacity(experiment, capacity=2.0, low=1.5, high=2.5):
    rows = [
        {"panel": panel["name"], "panel_x": panel["x"], "series": series["name"], "metric": experiment["metric"]}
        | {"slo": experiment["slo"], "capacity": capacity, "low": low, "high": high, "paper_capacity": None}
        for panel in experiment["panels"]
        for series in experiment["series"]
    ]
    return pd.DataFrame(rows)


def make_comparison():
    rng = np.random.default_rng(5)
    rows = []
    for (policy, label), rate in itertools.product((("vllm", "vLLM"), ("fastserve", "FastServe")), (1.0, 2.0)):
        row = {"policy": policy, "label": label, "rate": rate}
        for i, quantity in enumerate(("mean_jct_s", "p95_jct_s", LATENCY), 1):
            row[f"real_{quantity}"] = i * rate
            row[f"sim_{quantity}"] = i * rate * rng.uniform(0.9, 1.1)
            row[f"error_{quantity}"] = row[f"sim_{quantity}"] / row[f"real_{quantity}"] - 1
        rows.append(row | {"real_preemptions": 3, "sim_preemptions": 2})
    return pd.DataFrame(rows)


def inputs(kind):
    """Experiment, points, capacities and the paper's points for a figure of this kind, busy enough to be crowded."""
    if kind == "fidelity":
        return make_experiment(kind, series=[]), make_comparison(), None, NO_PAPER
    varied = kind in ("sweep", "ratios")
    x = {"label": "Starvation bound α (s)", "log": True} if varied else None
    metrics = [LATENCY, "p95_normalized_latency_s", "swap_out_bytes"] if varied else None
    panels = PANELS[:1] if kind == "breakdown" else PANELS
    experiment = make_experiment(kind, panels=panels, x=x, metrics=metrics)
    xs = (0.1, 1.0, 10.0, "never") if varied else (0.5, 1.0, 2.0, 4.0)
    if kind == "ratios":
        experiment |= {"over": "fastserve"}
    if kind == "comparisons":
        sides = [("vllm", "fcfs"), ("fastserve", "fcfs"), ("fastserve", "vllm")]
        experiment |= {
            "comparisons": [{"label": f"{of} over {over}, {way}", "of": of, "over": over} for of, over in sides
                            for way in ("as it is", "in another way", "in a third", "in a fourth")]
        }  # fmt: skip
    if kind == "slo":
        experiment |= {"slo": 0.95, "metric": "slo_attainment_1"}
    reported = REPORTED.assign(quantity="swapping_s") if kind == "breakdown" else REPORTED
    return experiment, make_points(experiment, xs), make_capacity(experiment), reported


def curves(axes: Axes):
    """Our lines: (colour, x, y)."""
    return [
        (to_hex(line.get_color()).upper(), *map(np.asarray, line.get_data()))
        for line in axes.lines
        if line.get_marker() != "None" and line.get_linestyle() != "None"
    ]


def hollow(axes: Axes):
    """The paper's points: (colour, marker, x, y)."""
    return [
        (to_hex(line.get_markeredgecolor()).upper(), line.get_marker(), *map(np.asarray, line.get_data()))
        for line in axes.lines
        if line.get_markerfacecolor() == "none"
    ]


def dots(axes: Axes):
    """Our points without a line: (colour, x, y)."""
    return [
        (to_hex(line.get_color()).upper(), *map(np.asarray, line.get_data()))
        for line in axes.lines
        if line.get_linestyle() == "None" and line.get_markerfacecolor() != "none" and len(line.get_xdata())
    ]


def means(points, panel, series, metric):
    rows = points[(points["panel"] == panel) & (points["series"] == series)]
    return rows.groupby("x", sort=False)[metric].mean()


# Files


def test_files_are_whole_and_the_same_again(tmp_path):
    written = []
    for name in ("one", "two"):
        stem = tmp_path / name / "figure.v1"
        stem.parent.mkdir()
        paths = draw(*inputs("load"), "Where it comes from.", ["A warning"], stem)
        assert [path.name for path in paths] == ["figure.v1.png", "figure.v1.pdf"]
        assert sorted(path.name for path in stem.parent.iterdir()) == ["figure.v1.pdf", "figure.v1.png"]
        written.append([path.read_bytes() for path in paths])
    png, pdf = written[0]
    assert written[0] == written[1]
    assert png.startswith(b"\x89PNG")
    assert png.endswith(b"IEND\xaeB`\x82")
    assert pdf.startswith(b"%PDF")
    assert pdf.rstrip().endswith(b"%%EOF")
    assert b"CreationDate" not in pdf
    assert int.from_bytes(png[16:20], "big") == 12 * 160


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(OutputError, match="nowhere/figure"):
        draw(*inputs("fidelity"), "", [], tmp_path / "nowhere/figure")


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_on_the_page_and_nothing_overlaps(kind):
    flags = [f"A warning about {'this and that, ' * 20}", "Another"]
    figure = figure_of(*inputs(kind), caption="Where it comes from, in many words. " * 12, flags=flags)
    figure.draw_without_rendering()
    page = figure.bbox
    for artist in [*figure.axes, *figure.legends, *figure.texts]:
        box = artist.get_tightbbox()
        assert min(box.x0 - page.x0, page.x1 - box.x1, box.y0 - page.y0, page.y1 - box.y1) >= 0, (artist, box)
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 11
    assert figure.get_figwidth() == 12
    above = [*figure.legends, figure.texts[0]]
    below = [text for text in figure.texts if text.get_text().startswith(("⚑", "    ", "Where"))]
    assert any("Another" in text.get_text() for text in below)
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for box in boxes:
        assert all(box.y1 <= artist.get_window_extent().y0 + 1 for artist in above)
        assert all(box.y0 >= text.get_window_extent().y1 - 1 for text in below)
        assert min(axes.get_window_extent().height for axes in figure.axes) > 100
    for one, other in itertools.combinations(boxes, 2):
        overlap = min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0)
        assert min(overlap) <= 1, (one, other)


# What is drawn


def test_load_draws_the_means_of_the_table_and_nothing_between():
    experiment = make_experiment("load", panels=PANELS)
    points = make_points(experiment)
    figure = figure_of(experiment, points, None, NO_PAPER)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [panel["title"] for panel in PANELS]
    for axes, panel in zip(figure.axes, PANELS, strict=True):
        drawn = curves(axes)
        assert len(drawn) == len(SERIES)
        for series, (color, x, y) in zip(SERIES, drawn, strict=True):
            table = means(points, panel["name"], series["name"], LATENCY)
            assert color == policy_style(series["policy"])[0]
            assert x.tolist() == table.index.tolist()
            assert y == pytest.approx(table.to_numpy())


def test_load_draws_the_papers_points_hollow_in_the_colour_and_with_the_marker_of_ours():
    experiment = make_experiment("load", panels=PANELS)
    figure = figure_of(experiment, make_points(experiment), None, REPORTED)
    (one,) = hollow(figure.axes[0])
    color, marker, x, y = one
    assert (color, marker) == policy_style("vllm")
    assert list(zip(x, y, strict=True)) == [(0.5, 0.01), (1.0, 0.02), (3.0, 5.0)]
    assert hollow(figure.axes[1]) == []
    low, high = figure.axes[0].get_ylim()
    assert low < 0.01
    assert high > 5


def test_load_draws_the_rerun_as_crosses_in_the_colour_of_ours_and_says_so():
    experiment = make_experiment("load", panels=[PANELS[0], PANELS[1] | {"slo": 0.2}])
    rerun = REPORTED.assign(source="rerun", value=[4.0, 0.03, 0.04])
    capacity = make_capacity(experiment).assign(rerun_capacity=4.9, capacity=4.0, low=3.7, high=4.4)
    figure = figure_of(experiment, make_points(experiment), capacity, pd.concat([REPORTED, rerun]))
    (line,) = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert to_hex(line.get_color()).upper() == policy_style("vllm")[0]
    assert list(zip(*line.get_data(), strict=True)) == [(0.5, 0.03), (1.0, 0.04), (3.0, 4.0)]
    assert len(hollow(figure.axes[0])) == 1
    assert not [line for line in figure.axes[1].lines if line.get_marker() == "x"]
    slos = [{*line.get_ydata()} for axes in figure.axes for line in axes.lines if line.get_linestyle() == "--"]
    assert [slo for slo in slos if len(slo) == 1] == [{0.3}, {0.2}]
    texts = [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()]
    assert texts[0] == "4.0 [3.7, 4.4]; rerun 4.9"
    legend = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert "crosses: the authors' rerun" in legend
    assert any(text.startswith("SLO:") and "0.2 in " in text for text in legend)


def test_points_of_the_paper_beyond_our_rates_and_latencies_are_within_the_axes():
    experiment = make_experiment("load")
    far = REPORTED.assign(rate=[30.0, 0.01, 20.0], value=[900.0, 1e-4, 3.0])
    (axes,) = figure_of(experiment, make_points(experiment), None, far).axes
    assert axes.get_xlim()[0] < 0.01
    assert axes.get_xlim()[1] > 30
    assert axes.get_ylim()[0] < 1e-4
    assert axes.get_ylim()[1] > 900


def test_bands_are_the_95_percent_intervals_and_absent_for_one_seed():
    experiment = make_experiment("load", series=SERIES[:1])
    points = make_points(experiment)
    (axes,) = figure_of(experiment, points, None, NO_PAPER).axes
    (band,) = axes.collections
    drawn = band.get_paths()[0].vertices
    for x, rows in points.groupby("x"):
        estimate = mean_estimate(rows[LATENCY].to_numpy())
        at_x = drawn[drawn[:, 0] == x][:, 1]
        assert (at_x.min(), at_x.max()) == pytest.approx((estimate.low, estimate.high))
        assert estimate.low < rows[LATENCY].mean() < estimate.high
    (axes,) = figure_of(experiment, points[points["seed"] == 0], None, NO_PAPER).axes
    assert [len(path.vertices) for band in axes.collections for path in band.get_paths()] == []
    assert len(curves(axes)) == 1


def test_a_point_without_a_value_leaves_a_gap_and_is_flagged():
    experiment = make_experiment("load", series=SERIES[:1])
    points = make_points(experiment)
    points.loc[(points["x"] == 2) & (points["seed"] == 1), LATENCY] = None
    (axes,) = figure_of(experiment, points, None, NO_PAPER).axes
    _, x, y = curves(axes)[0]
    assert np.isnan(y).tolist() == [False, False, True, False]
    assert x[2] == 2
    assert flags_of(experiment, points, None) == [
        "Omitted, at least one seed has no value: OPT-13B, ShareGPT: vLLM at 2"
    ]


def test_the_slo_is_a_dashed_line_and_the_capacities_are_said():
    experiment = make_experiment("load")
    capacity = make_capacity(experiment).assign(paper_capacity=4.9, capacity=4.0, low=3.7, high=4.4)
    (axes,) = figure_of(experiment, make_points(experiment), capacity, REPORTED).axes
    (line,) = [line for line in axes.lines if line.get_linestyle() == "--" and line.get_marker() == "None"]
    assert set(line.get_ydata()) == {0.3}
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts[0] == "vLLM\n4.0 [3.7, 4.4]; paper 4.9"
    assert any("mean normalized latency ≤ 0.3 s/token" in text for text in texts)
    two = make_experiment("load", panels=PANELS)
    figure = figure_of(two, make_points(two), make_capacity(two), NO_PAPER)
    for axes in figure.axes:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["2.0 [1.5, 2.5]"] * len(SERIES)


@pytest.mark.parametrize(
    ("found", "scale", "text"),
    [
        ((2.0, 1.5, math.inf), 1, "2.0 [1.5, >4.0]"),
        ((2.0, -math.inf, 2.5), 1, "2.0 [<0.50, 2.5]"),
        ((2.0, None, None), 1, "2.0"),
        ((None, math.inf, math.inf), 0.001, ">4.0"),
        ((None, 3.5, math.inf), 0.001, ">4.0 [3.5, >4.0]"),
        ((None, -math.inf, -math.inf), 1000, "<0.50"),
        ((None, None, None), math.nan, "?"),
    ],
)
def test_a_capacity_beyond_the_rates_measured_says_on_which_side(found, scale, text):
    experiment = make_experiment("load")
    points = make_points(experiment)
    points[LATENCY] *= scale
    tables = Tables(experiment, points, make_capacity(experiment, *found))
    assert capacity_text(tables, "a", SERIES[0], LATENCY) == text


def test_slo_draws_each_strictness_in_percent():
    experiment, points, _, _ = inputs("slo")
    figure = figure_of(experiment, points, None, NO_PAPER)
    cells = itertools.product(PANELS, ("0.5", "1", "2"))
    for axes, (panel, scale) in zip(figure.axes, cells, strict=True):
        for series, (_, x, y) in zip(SERIES, curves(axes), strict=True):
            table = means(points, panel["name"], series["name"], f"slo_attainment_{scale}")
            assert x.tolist() == table.index.tolist()
            assert y == pytest.approx(100 * table.to_numpy())
        assert f"< {3.1 * float(scale):g} s" in axes.get_title(loc="left")
        assert any(set(line.get_ydata()) == {95} for line in axes.lines)
        assert axes.get_ylim() == (-2, 104)


def test_sweep_draws_categories_apart_from_the_line():
    experiment, points, _, _ = inputs("sweep")
    experiment |= {"panels": PANELS[:1]}
    figure = figure_of(experiment, points, None, NO_PAPER)
    for axes, metric, scale in zip(figure.axes, experiment["metrics"], (1, 1, 1e-9), strict=True):
        never = [label.get_position()[0] for label in axes.get_xticklabels() if label.get_text() == "never"]
        assert 10 < never[0] < axes.get_xlim()[1]
        for series, line, dot in zip(SERIES, curves(axes), dots(axes), strict=True):
            table = scale * means(points, "a", series["name"], metric)
            assert line[1].tolist() == [0.1, 1.0, 10.0]
            assert line[2] == pytest.approx(table.to_numpy()[:3])
            assert dot[1].tolist() == never
            assert dot[2] == pytest.approx(table.to_numpy()[3:])
        assert axes.get_xscale() == "log"


def test_labels_of_ticks_and_axes_fit_beside_each_other():
    x = {"label": "A very long name of the quantity that varies here (unit)", "log": True}
    metrics = [LATENCY, "p95_normalized_latency_s", "swap_out_bytes"]
    experiment = make_experiment("sweep", metrics=metrics, x=x, series=SERIES[:1], slo=None)
    points = make_points(experiment, xs=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 20000.0, "never"))
    figures = [figure_of(experiment, points, None, NO_PAPER)]
    names = [
        "13B, recorded lengths",
        "66B on four A100-80GB, published means",
        "66B TP2 × PP2, published means",
        "175B",
    ]
    panels = [{"name": name, "title": "", "x": name} for name in names]
    experiment = make_experiment("capacity", panels=panels, series=SERIES[:1])
    figures.append(figure_of(experiment, make_points(experiment), make_capacity(experiment), NO_PAPER))
    for figure in figures:
        labels = [axes.xaxis.label.get_window_extent() for axes in figure.axes]
        for axes in figure.axes:
            ticks = [label.get_window_extent() for label in axes.get_xticklabels()]
            assert len(ticks) > 3
            assert all(left.x1 < right.x0 for left, right in itertools.pairwise(ticks))
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(labels))


def test_sweep_keeps_zeros_in_sight_beside_large_values():
    experiment = make_experiment("sweep", metrics=["swap_out_bytes"], series=SERIES[:1])
    points = make_points(experiment)
    points["swap_out_bytes"] = points["x"].map({0.5: 0.0, 1.0: 1e7, 2.0: 1e9, 4.0: 1e12})
    (axes,) = figure_of(experiment, points, None, NO_PAPER).axes
    assert axes.get_yscale() == "symlog"
    bottom, top = axes.get_ylim()
    assert bottom < 0
    assert top > 1000
    assert curves(axes)[0][2] == pytest.approx([0, 0.01, 1, 1000])


def test_capacity_over_numbers_has_lines_and_whiskers():
    experiment = make_experiment("capacity", panels=PANELS, x={"label": "Batch", "log": True})
    capacity = make_capacity(experiment)
    capacity.loc[capacity["panel"] == "b", ["capacity", "low", "high"]] = [3.0, 2.5, 3.5]
    (axes,) = figure_of(experiment, make_points(experiment), capacity, NO_PAPER).axes
    for (color, x, y), series in zip(curves(axes), SERIES, strict=True):
        assert color == policy_style(series["policy"])[0]
        assert x.tolist() == [16, 64]
        assert y.tolist() == [2, 3]
    whiskers = [path.vertices[:, 1].tolist() for lines in axes.collections for path in lines.get_paths()]
    assert sorted(whiskers) == sorted([[1.5, 2.5], [2.5, 3.5]] * len(SERIES))


def test_capacity_marks_what_lies_beyond_the_rates_and_what_is_not_known():
    panels = [PANELS[0] | {"x": "OPT-13B"}, PANELS[1] | {"x": "OPT-66B"}, {"name": "c", "title": "", "x": "OPT-175B"}]
    experiment = make_experiment("capacity", panels=panels, series=SERIES[:1])
    points = make_points(experiment)
    points.loc[points["panel"] == "a", LATENCY] = 0.01
    points.loc[(points["panel"] == "b") & (points["x"] == 1), LATENCY] = None
    capacity = make_capacity(experiment).assign(paper_capacity=[5.0, None, None])
    capacity.loc[:1, ["capacity", "low", "high"]] = None
    capacity.loc[0, ["low", "high"]] = math.inf
    capacity.loc[2, "high"] = math.inf
    figure = figure_of(experiment, points, capacity, NO_PAPER)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["OPT-13B", "OPT-66B", "OPT-175B"]
    marks = {line.get_marker(): line.get_data() for line in axes.lines}
    assert marks["_"] == ([0], [4.0])  # the highest rate measured, with an arrow on it
    assert marks["x"][0] == [1]
    assert hollow(axes)[0][2:] == ([0], [5.0])
    assert [arrow.xy for arrow in axes.texts] == [(0, 4.0), (2, 4.0)]
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "higher than any rate measured" in said
    assert "lower than any rate measured" not in said
    assert "not known: some seed has no value" in said


def test_breakdown_stacks_the_parts_and_shows_the_papers():
    experiment = make_experiment("breakdown", series=[SERIES[2]])
    points = make_points(experiment)
    parts = {"queuing_s": [40.0, 90.0], "swapping_s": [1.0, 0.9], "execution_s": [9.0, 9.1]}
    reported = pd.concat(
        pd.DataFrame(
            {"panel": "a", "source": "paper", "system": "FastServe", "quantity": name, "rate": [2.0, 3.0]}
        ).assign(value=values)
        for name, values in parts.items()
    )
    stacked, each, share = figure_of(experiment, points, None, reported).axes
    tables = [means(points, "a", "fastserve", part) for part in PARTS]
    heights = [[bar.get_height() for bar in bars] for bars in stacked.containers]
    bottoms = [[bar.get_y() for bar in bars] for bars in stacked.containers]
    assert np.array(heights) == pytest.approx(np.array(tables))
    assert np.array(bottoms) == pytest.approx(np.cumsum([np.zeros(4), *tables[:2]], axis=0))
    ticks = [label.get_text() for label in share.get_xticklabels()]
    assert ticks == ["0.5", "1", "2", "3", "4"]
    assert [y.tolist() for _, _, y in dots(each)] == [pytest.approx(list(table)) for table in tables]
    assert [(x.tolist(), y.tolist()) for _, _, x, y in hollow(each)] == [([2, 3], values) for values in parts.values()]
    assert dots(share)[0][2] == pytest.approx((100 * tables[1] / sum(tables)).to_numpy())
    assert hollow(share)[0][3] == pytest.approx([2.0, 0.9])
    assert hollow(stacked)[0][3] == pytest.approx([50, 100])


def test_deciles_draw_ten_means_for_each_load():
    experiment = make_experiment("deciles")
    points = make_points(experiment, xs=(1.0, 3.0))
    figure = figure_of(experiment, points, None, NO_PAPER)
    for axes, load in zip(figure.axes, (1.0, 3.0), strict=True):
        assert f"Request rate: {load:g} requests/s" in axes.get_title(loc="left")
        for series, (_, x, y) in zip(SERIES, curves(axes), strict=True):
            rows = points[(points["series"] == series["name"]) & (points["x"] == load)]
            assert x.tolist() == list(range(1, 11))
            assert y == pytest.approx([rows[f"slowdown_decile_{i}"].mean() for i in range(1, 11)])


def test_bars_are_as_high_as_the_means_with_whiskers_over_seeds():
    experiment = make_experiment("bars", slo=None)
    points = make_points(experiment, xs=(2.0, 4.0))
    metrics = {LATENCY: 1000, "p95_normalized_latency_s": 1000, "output_tokens_per_s": 1}
    figure = figure_of(experiment, points, None, NO_PAPER)
    for axes, (metric, scale) in zip(figure.axes, metrics.items(), strict=True):
        bars = [container for container in axes.containers if hasattr(container, "patches")]
        for series, drawn in zip(SERIES, bars, strict=True):
            table = means(points, "a", series["name"], metric)
            assert [bar.get_height() for bar in drawn] == pytest.approx(list(scale * table))
            assert drawn.errorbar is not None
    one_seed = points[points["seed"] == 0]
    assert all(
        container.errorbar is None
        for axes in figure_of(experiment, one_seed, None, NO_PAPER).axes
        for container in axes.containers
    )


def test_fidelity_draws_simulated_over_real_and_the_errors():
    table = make_comparison()
    times, errors = figure_of(make_experiment("fidelity", series=[]), table, None, NO_PAPER).axes
    drawn = {(float(x[0]), float(y[0])) for _, x, y in dots(times)}
    expected = {
        (row[f"real_{quantity}"], row[f"sim_{quantity}"])
        for row in table.to_dict("records")
        for quantity in ("mean_jct_s", "p95_jct_s")
    }
    assert drawn == expected
    quantities = ("mean_jct_s", "p95_jct_s", LATENCY)
    worst = table[[f"error_{quantity}" for quantity in quantities]].abs().max(axis=1)
    ordered = table.loc[worst.sort_values(ascending=False).index]  # The run with the largest error is on top.
    for (_, x, y), quantity in zip(dots(errors), quantities, strict=True):
        assert x == pytest.approx((ordered[f"sim_{quantity}"] / ordered[f"real_{quantity}"] - 1).to_numpy())
        assert y.tolist() == [0, 1, 2, 3]
    names = [label.get_text() for label in errors.get_yticklabels()]
    assert names == [f"{row['label']}, {row['rate']:g}/s" for row in ordered.to_dict("records")]
    _, errors = figure_of(make_experiment("fidelity"), table.assign(load=0.8), None, NO_PAPER).axes
    assert {label.get_text() for label in errors.get_yticklabels()} == {"vLLM, load 0.8", "FastServe, load 0.8"}


def test_ratios_are_over_the_same_seeds_of_the_reference_a_row_each_setting():
    experiment, points, _, _ = inputs("ratios")
    figure = figure_of(experiment, points, None, NO_PAPER)
    rows = list(itertools.product(PANELS, (0.1, 1.0, 10.0, "never")))
    others = [series for series in SERIES if series["name"] != "fastserve"]
    said = [label.get_text().replace("\n", " ") for label in figure.axes[0].get_yticklabels()]
    assert said == [f"{panel['title']} · {x if x == 'never' else f'{x:g}'}" for panel, x in rows]
    for axes, metric in zip(figure.axes, experiment["metrics"][:2], strict=False):
        values = points.astype({"x": str}).set_index(["panel", "series", "x", "seed"])[metric].sort_index()
        assert axes.get_xscale() == "log"
        assert len(dots(axes)) == len(others)
        for series, (color, ratio, y), whiskers in zip(others, dots(axes), axes.collections, strict=True):
            assert color == policy_style(series["policy"])[0]
            assert np.round(y).tolist() == list(range(len(rows)))
            expected = [
                ratio_of_means(
                    *(values[panel["name"], each, str(x)].to_numpy() for each in (series["name"], "fastserve"))
                )
                for panel, x in rows
            ]
            assert ratio == pytest.approx([estimate.value for estimate in expected])
            ends = [path.vertices[:, 0] for path in whiskers.get_paths()]
            assert np.array(ends) == pytest.approx(np.array([(each.low, each.high) for each in expected]))
        heights = np.sort(np.concatenate([y for _, _, y in dots(axes)]))
        assert np.diff(heights).min() > 0.2  # beside each other, not one over the other
        (one,) = [line for line in axes.lines if set(line.get_xdata()) == {1}]
        assert to_hex(one.get_color()).upper() == policy_style("fastserve")[0]


def test_ratios_beyond_the_axis_are_at_its_edge_with_an_arrow():
    experiment, points, _, _ = inputs("ratios")
    experiment |= {"metrics": [LATENCY]}
    for series, x, factor in (("vllm", 1.0, 1e3), ("fcfs", 10.0, 1e-3)):
        points.loc[(points["series"] == series) & (points["x"] == x) & (points["panel"] == "a"), LATENCY] *= factor
    figure = figure_of(experiment, points, None, NO_PAPER)
    (axes,) = figure.axes
    arrows = [line for line in axes.lines if "arrow" in str(line.get_marker()) and len(line.get_xdata())]
    at = [(line.get_marker(), *line.get_xdata(), *np.round(line.get_ydata())) for line in arrows]
    assert at == [(r"$\rightarrow$", LIMITS[1], 1), (r"$\leftarrow$", LIMITS[0], 2)]
    edges = [x for _, ratio, _ in dots(axes) if len(ratio) > 1 for x in ratio if x in LIMITS]
    assert edges == [LIMITS[1], LIMITS[0]]
    assert "beyond 1/20 or 20" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_ratios_need_points_of_the_reference_and_what_has_none_is_flagged():
    experiment, points, _, _ = inputs("ratios")
    assert flags_of(experiment, points, None) == [
        "Omitted, FastServe has no value there, or 0: OPT-13B, ShareGPT: vLLM at 0.1, FastServe-FCFS at 0.1, "
        "FastServe, reactive at 0.1; OPT-66B, Alpaca: vLLM at 0.1, FastServe-FCFS at 0.1, FastServe, reactive at 0.1"
    ]  # nothing is swapped at the lowest load
    experiment |= {"metrics": [LATENCY]}
    points.loc[(points["series"] == "fcfs") & (points["x"] == 1) & (points["seed"] == 1), LATENCY] = None
    points = points[(points["series"] != "fastserve") | (points["panel"] == "a")]
    first, second = flags_of(experiment, points, None)
    assert first.endswith("OPT-13B, ShareGPT: FastServe-FCFS at 1; OPT-66B, Alpaca: FastServe-FCFS at 1")
    assert second.count("at 0.1, 1, 10, never") == 3
    (axes,) = figure_of(experiment, points, None, NO_PAPER).axes
    assert len(axes.get_yticks()) == 4
    assert np.isnan(dots(axes)[1][1]).tolist() == [False, True, False, False]
    with pytest.raises(ConfigError, match="none of the series 'fastserve'"):
        figure_of(experiment, points[points["series"] != "fastserve"], None, NO_PAPER)
    with pytest.raises(ConfigError, match="set over to one of vllm, fcfs"):
        figure_of(experiment | {"over": None}, points, None, NO_PAPER)


def test_a_page_of_ratios_grows_with_its_rows():
    experiment = inputs("ratios")[0]
    experiment |= {"panels": [{"name": f"p{i}", "title": f"Setting {i}"} for i in range(8)], "metrics": [LATENCY]}
    heights = [
        figure_of(experiment, make_points(experiment, xs), None, NO_PAPER).get_figheight()
        for xs in ((1.0, 2.0), (1.0, 2.0, 4.0, 8.0))
    ]
    assert heights[1] - heights[0] == pytest.approx(16 * 0.3, rel=0.2)
    assert heights[1] < 16


@pytest.mark.parametrize("kind", ["load", "slo", "capacity", "sweep", "deciles", "bars", "ratios"])
def test_a_panel_may_lack_a_series(kind):
    experiment, points, capacity, _ = inputs(kind)
    points = points[(points["series"] != "fcfs") | (points["panel"] == "a")]
    capacity = capacity[(capacity["series"] != "fcfs") | (capacity["panel"] == "a")]
    figure = figure_of(experiment, points, capacity, NO_PAPER, flags=flags_of(experiment, points, capacity))
    assert figure.texts[0].get_text() == "A figure"


def headline_table():
    """Four claims of the paper, one of them a load, and a finding."""
    rows = [
        ("A gain", "capacity_ratio", "paper", "Fig. 11a", 2.0, 2.0, 1.9, 2.2, 2.1, 2.4, 1.8, 3.0, "consistent"),
        ("A range", "ratio", "paper", "Fig. 16", 4.0, 9.0, None, 3.0, 2.0, math.inf, 0, math.inf, "attenuated"),
        ("Never measured", "none", "paper", "v3", 31.4, 31.4, None, None, None, None, None, None, "untestable"),
        ("A load", "capacity", "paper", "Fig. 11a", 0.2, 0.2, None, 0.25, 0.24, 0.27, 0.2, 0.3, "consistent"),
        ("No claim", "ratio", "beyond", "x", None, None, None, 7.0, 6.0, 8.0, 5.0, 9.0, "found"),
    ]
    columns = ["label", "kind", "group", "source", "paper_low", "paper_high", "rerun", "value", "low", "high",
               "sample_low", "sample_high", "verdict"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def test_the_headline_shows_claims_figure_by_figure_with_intervals_rerun_and_verdict():
    figure = headline_of(headline_table())
    axes, table = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A gain", "A range", "Never measured"]
    headings = [text.get_text() for text in axes.texts]
    assert headings == ["Figure 11", "Figure 16", "Abstracts and earlier versions"]
    ours = {line.get_marker(): line for line in axes.lines if line.get_color() == "#009E73"}
    assert ours["o"].get_xdata().tolist() == [2.2]
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [line.get_xdata().tolist() for line in crosses] == [[1.9]]
    bars = [path.vertices[:, 0].tolist() for lines in axes.collections for path in lines.get_paths()]
    low, high = axes.get_xlim()
    assert bars == [[1.8, 3.0], [2.1, 2.4], [low, high], [2.0, high]]
    arrows = [line.get_marker() for line in axes.lines if line.get_marker() in ("<", ">")]
    assert arrows == ["<", ">", ">"]
    said = [text.get_text() for text in table.texts]
    assert said[:12] == ["2", "1.9", "2.2 [2.1, 2.4]", "consistent", "4 to 9", "", "3 [2, ∞]", "attenuated", "31.4", "",
                         "no value", "untestable"]  # fmt: skip
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"consistent", "attenuated", "untestable"} <= set(legend)
    assert "contradicted" not in legend
    for each in figure.axes:
        box = each.get_tightbbox()
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1


def test_loads_have_a_page_of_their_own():
    axes, table = headline_of(headline_table(), loads=True).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A load"]
    assert [text.get_text() for text in table.texts][:4] == ["0.2", "", "0.25 [0.24, 0.27]", "consistent"]


def test_a_headline_without_claims_or_without_a_column_is_refused():
    table = headline_table()
    with pytest.raises(ConfigError, match="'verdict'"):
        headline_of(table.drop(columns="verdict"))
    with pytest.raises(ConfigError, match="nothing to draw"):
        headline_of(table.iloc[4:])
    with pytest.raises(ConfigError, match="nothing to draw"):
        headline_of(table.drop(index=3), loads=True)


def test_tables_may_come_from_csv_files(tmp_path):
    panels = [{"name": "", "title": "", "x": None}]
    experiment = make_experiment("sweep", panels=panels, metrics=None)
    points = make_points(experiment, xs=(0.1, 1.0, "never"))
    points.to_csv(tmp_path / "points.csv", index=False)
    read = pd.read_csv(tmp_path / "points.csv")
    assert read["panel"].isna().all()
    assert read["x"].tolist() != points["x"].tolist()
    (axes,) = figure_of(experiment, read, None, NO_PAPER).axes
    assert [line[1].tolist() for line in curves(axes)] == [[0.1, 1.0]] * len(SERIES)
    numbered = make_experiment("load", panels=[{"name": "16", "title": "16"}, {"name": "128", "title": "128"}])
    make_points(numbered).to_csv(tmp_path / "points.csv", index=False)
    figure = figure_of(numbered, pd.read_csv(tmp_path / "points.csv"), None, NO_PAPER)
    assert [len(curves(axes)) for axes in figure.axes] == [len(SERIES)] * 2
    assert all(len(x) == 4 for axes in figure.axes for _, x, _ in curves(axes))


# Errors


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ConfigError, match=r"unknown figure 'pie'; known: load, slo, capacity"):
        figure_of(make_experiment("pie"), pd.DataFrame(), None, NO_PAPER)


def test_tables_that_lack_what_is_drawn_are_errors():
    experiment = make_experiment("load", metric="p33_latency")
    with pytest.raises(ConfigError, match=r"no column 'p33_latency'; there are: panel, series"):
        figure_of(experiment, make_points(experiment), None, NO_PAPER)
    with pytest.raises(ConfigError, match="give the experiment an slo"):
        figure_of(make_experiment("capacity"), make_points(experiment), None, NO_PAPER)
    no_x = make_experiment("capacity", panels=[PANELS[0] | {"x": None}])
    with pytest.raises(ConfigError, match="'a' has none"):
        figure_of(no_x, make_points(no_x), make_capacity(no_x), NO_PAPER)
    breakdown = make_experiment("breakdown")
    with pytest.raises(ConfigError, match="'napping_s'"):
        figure_of(breakdown, make_points(breakdown), None, REPORTED.assign(quantity="napping_s"))
    with pytest.raises(ConfigError, match="'quantity'"):
        figure_of(breakdown, make_points(breakdown), None, REPORTED)
    with pytest.raises(ConfigError, match="'sim_mean_jct_s'"):
        figure_of(make_experiment("fidelity"), make_comparison().drop(columns="sim_mean_jct_s"), None, NO_PAPER)
    with pytest.raises(ConfigError, match="x is 0: a logarithmic axis"):
        XAxis([0, 1], log=True)
    with pytest.raises(ConfigError, match="no x"):
        XAxis([None, 1.0, math.nan])


# Flags


def test_flags_name_what_falls_fails_and_stays_idle():
    experiment = make_experiment("load", panels=PANELS)
    points = make_points(experiment)
    assert flags_of(experiment, points, None) == []
    fallen = (points["panel"] == "b") & (points["series"] == "vllm") & (points["x"] == 4)
    peak = means(points, "b", "vllm", LATENCY)[2.0]
    points.loc[fallen, LATENCY] = 0.75 * peak
    points.loc[fallen, "failed"] = 5
    assert flags_of(experiment, points, None) == [
        "Not monotone over the load: OPT-66B, Alpaca: vLLM (down 25\u00a0%)",
        "Requests failed; latencies cover the finished requests: OPT-66B, Alpaca: vLLM (15 of 150)",
    ]
    assert flags_of(experiment | {"figure": "deciles"}, points, None)[0].startswith("Requests failed")
    bars = make_experiment("bars")
    assert flags_of(bars, make_points(bars), None) == []
    (flag,) = flags_of(bars, make_points(bars).assign(preemptions=0), None)
    assert "No request was preempted" in flag


def test_flags_of_attainment_and_of_the_papers_curves():
    experiment, points, _, _ = inputs("slo")
    assert flags_of(experiment, points, None) == []
    points.loc[(points["series"] == "fcfs") & (points["x"] == 4) & (points["panel"] == "a"), "slo_attainment_2"] = 1.0
    (flag,) = flags_of(experiment, points, None)
    assert "OPT-13B, ShareGPT: FastServe-FCFS (up" in flag
    load = make_experiment("load")
    capacity = make_capacity(load).assign(paper_monotone=[False, None, True, None], paper_system=["vLLM", "", "F", ""])
    assert flags_of(load, make_points(load), capacity) == ["Not monotone in the paper: OPT-13B, ShareGPT: vLLM"]
    twice = capacity.assign(paper_monotone=[False, False, True, None], paper_system=["vLLM", "vLLM", "F", ""])
    assert flags_of(load, make_points(load), twice) == ["Not monotone in the paper: OPT-13B, ShareGPT: vLLM"]
    fidelity = make_experiment("fidelity")
    assert flags_of(fidelity, make_comparison().assign(processor_share=0.99), None) == []
    crowded = make_comparison().assign(processor_share=[1.0, 0.97, 0.33, 1.0])
    assert flags_of(fidelity, crowded, None) == [
        "Other programs left 33\u00a0% of the processors: the errors are partly theirs"
    ]


# Style

# Machado, Oliveira and Fernandes (2009): how a deuteranope sees linear RGB.
DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)
RGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = np.array([0.9505, 1.0, 1.089])


def lab(color, vision):
    """CIELAB of a colour as it is seen."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = RGB_TO_XYZ @ np.clip(vision @ linear, 0, 1) / WHITE
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize(("vision", "threshold"), [(np.eye(3), 25), (DEUTERANOPIA, 15)], ids=["all", "deuteranopia"])
def test_colours_of_policies_differ_to_every_eye(vision, threshold):
    for one, other in itertools.combinations(POLICIES, 2):
        distance = np.linalg.norm(lab(policy_style(one)[0], vision) - lab(policy_style(other)[0], vision))
        assert distance > threshold, (one, other, distance)
    assert len({policy_style(policy)[1] for policy in POLICIES}) == len(POLICIES)


@given(st.permutations([*POLICIES, "mine:Policy", "yours:Policy"]))
def test_a_policy_keeps_its_colour_and_marker_in_any_company(policies):
    series = [{"name": f"s{i}", "policy": policy} for i, policy in enumerate(policies)]
    styles = series_styles(series)
    for each in series:
        if each["policy"] in POLICIES:
            assert styles[each["name"]] == (*policy_style(each["policy"]), ())
    assert len({style[:2] for style in styles.values()}) == len(series)


@pytest.mark.parametrize("policy", POLICIES)
def test_markers_alone_tell_seven_series_of_any_policy_apart(policy):
    styles = series_styles([{"name": f"s{i}", "policy": policy, "variant": i > 2} for i in range(7)])
    assert len({style.marker for style in styles.values()}) == 7


def test_series_of_one_policy_share_its_colour_and_differ_in_dashes_and_marker():
    styles = series_styles([SERIES[2] | {"name": f"s{i}", "variant": i > 0} for i in range(6)])
    assert {style.color for style in styles.values()} == {policy_style("fastserve")[0]}
    assert len({style.marker for style in styles.values()}) == 6
    assert len({style.dashes for style in styles.values()}) == 6
    assert styles["s0"].dashes == ()
    backwards = series_styles([SERIES[2] | {"name": f"s{i}", "variant": i < 2} for i in range(3)])
    assert backwards["s2"] == (*policy_style("fastserve"), ())
    assert len({style.dashes for style in backwards.values()}) == 3
    assert series_styles([SERIES[2] | {"variant": True}])["fastserve"].dashes


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e9), st.just(math.nan)), min_size=1, max_size=8))
def test_no_value_is_outside_the_axes(values):
    axes = Figure().subplots()
    scale_y([axes], np.array(values))
    low, high = axes.get_ylim()
    shown = axes.transData.transform([(0, value) for value in values if not math.isnan(value)])
    assert low < high
    assert all(low <= value <= high for value in values if not math.isnan(value))
    assert np.isfinite(shown).all()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=6, unique=True),
    st.lists(st.sampled_from(["never", "always", "inf"]), unique=True),
    st.booleans(),
)
def test_categories_stand_right_of_the_numbers_within_the_axes(numbers, words, log):
    at = XAxis([*words, *numbers], log=log)
    axes = Figure().subplots()
    at.apply(axes, "x")
    low, high = axes.get_xlim()
    positions = [at.of(x) for x in at.values]
    assert at.values[: len(numbers)] == sorted(numbers)
    assert positions[: len(numbers)] == sorted(numbers)
    assert positions == sorted(set(positions))
    assert low < positions[0]
    assert positions[-1] < high


@pytest.mark.parametrize(
    ("metric", "label"),
    [
        ("p95_ttft_s", "P95 time to first token (s)"),
        ("mean_normalized_latency_s", "Mean normalized latency (s/token)"),
        ("max_slowdown", "Max slowdown (× alone on the machine)"),
        ("mean_jct_settled_s", "Mean completion time after 500 requests (s)"),
        ("p95_normalized_latency_settled_s", "P95 normalized latency after 500 requests (s/token)"),
        ("p99_slowdown_settled", "P99 slowdown after 500 requests (× alone on the machine)"),
        ("settled_requests", "Settled requests"),
        ("swap_out_bytes", "Swapped out (GB)"),
        ("slo_attainment_0.5", "Requests within the SLO (%)"),
        ("some_other_count", "Some other count"),
    ],
)
def test_metrics_are_named_in_words(metric, label):
    assert metric_label(metric) == label


def test_an_slo_is_named_as_a_condition():
    assert bound("p95_ttft_s", 0.5) == "P95 time to first token ≤ 0.5 s"
    assert bound("slo_attainment_1", 0.95) == "requests within the SLO ≥ 95 %"

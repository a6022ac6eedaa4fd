"""Pages whose numbers come out of tables: the committed ones, and what templates may ask of results."""

import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.errors import ConfigError
from harness.analysis.against_itself import against_itself_table
from harness.analysis.claims import Claims, claims_table
from harness.analysis.comparisons import comparisons_table
from harness.analysis.files import write_csv, write_json
from harness.analysis.measures import Evidence
from harness.analysis.points import capacity_table, load_reported
from harness.analysis.targets import targets_table
from harness.experiments.experiment import Experiment
from harness.experiments.files import read_yaml
from harness.report.pages import Recorded, Results, compared, record, render, templates
from harness.report.pages.functions import functions_on
from harness.report.pages.numbers import interval, markdown, percent, short, unsigned, with_interval
from harness.report.pages.recorded import read_recorded, write_recorded
from harness.report.pages.render import page_name
from tools.write_pages import PLOTTED, ROOT, TABLES, TEMPLATES, add_fidelity, copy_figures, write_of

ONE_CLAIM = {
    "claim",
    "value",
    "inverse",
    "number",
    "paper",
    "rerun",
    "difference",
    "sample",
    "retained",
    "verdict",
    "reason",
    "span",
}
"""Functions whose texts are ids of claims."""
ONE_EXPERIMENT = {
    "capacity",
    "load",
    "load_difference",
    "table_of",
    "loads_table",
    "comparison",
    "comparisons_table",
    "ratio",
    "wins",
    "ratios_table",
    "value_at",
    "target",
    "target_value",
    "met",
    "targets_table",
    "ready_table",
    "agreement",
    "pairs_table",
}
"""Functions whose first argument is an experiment."""
NO_PAIRS = pd.DataFrame(columns=["experiment", "run", "series", "label", "load", "seed", "metric", "error", "within"])
EXPERIMENT = {
    "title": "Tiny",
    "figure": "load",
    "backend": "sim",
    "seeds": [0, 1, 2],
    "slo": 0.3,
    "panels": [
        {"name": "a", "title": "OPT-13B", "paper": {"figure": "fig11", "dataset": "sharegpt", "model": "opt-13b"}},
        {"name": "b", "title": "OPT-13B | again"},
    ],
    "points": [{"rate": 1, "num_requests": 9}, {"rate": 4, "num_requests": 9}],
    "series": [
        {"name": "fcfs", "label": "FCFS", "policy": "fastserve-fcfs", "paper_system": "FastServe-FCFS"},
        {"name": "fastserve", "label": "FastServe", "policy": "fastserve", "paper_system": "FastServe"},
    ],
    "comparisons": [{"label": "over FCFS", "of": "fastserve", "over": "fcfs"}],
    "targets": [
        {"claim": "T", "metric": "mean_jct_s", "of": "fastserve", "over": "fcfs", "statistic": "largest", "at_most": 1}
    ],
}
CLAIMS = [
    {
        "id": "gain",
        "group": "paper",
        "claim": "FastServe over FCFS",
        "source": "S",
        "paper": [1.5, 1.75],
        "measure": {"kind": "capacity_ratio", "experiment": "tiny", "panel": "a", "of": "fastserve", "over": "fcfs"},
    },
    {
        "id": "lost",
        "group": "paper",
        "claim": "Lost",
        "source": "S",
        "paper": 3,
        "measure": {"kind": "none"},
        "reason": "R.",
    },
]


def points():
    """FCFS crosses 0.3 s at 2 requests/s in the mean, FastServe at 3; a seed differs by a per cent from the next."""
    rows = []
    for panel in "ab":
        for series, at_4 in (("fcfs", 0.7), ("fastserve", 0.4)):
            for x, latency in ((1.0, 0.1), (4.0, at_4)):
                for seed in (0, 1, 2):
                    value = latency * (1 + 0.01 * (seed - 1))
                    place = {"experiment": "tiny", "panel": panel, "series": series, "label": series, "policy": series}
                    rows.append(place | {"x": x, "seed": seed, "run": f"{panel}-{series}-{x}-{seed}"})
                    rows[-1] |= {"mean_normalized_latency_s": value, "mean_jct_s": 100 * value}
    return pd.DataFrame(rows)


@pytest.fixture
def results(tmp_path):
    """The tables that the pipeline's own steps make of `points`, as the source of pages."""
    experiment, folder = Experiment.model_validate(EXPERIMENT), tmp_path / "results"
    (folder / "tiny").mkdir(parents=True)
    (folder / "headline").mkdir()
    reported = load_reported(*PLOTTED, experiment)
    write_csv(points(), folder / "tiny/points.csv")
    write_csv(capacity_table("tiny", experiment, points(), reported), folder / "tiny/capacity.csv")
    write_csv(comparisons_table(experiment, points(), reported), folder / "tiny/comparisons.csv")
    write_csv(against_itself_table({"tiny": (experiment, points())}), folder / "headline/a-a.csv")
    write_csv(targets_table(experiment, points()), folder / "tiny/targets.csv")
    claims = Claims.model_validate({"claims": CLAIMS}).claims
    evidence = {"tiny": Evidence(experiment, points(), reported)}
    write_csv(claims_table(claims, evidence), folder / "headline/claims.csv")
    made_by = [{"commit": "0123456789abcdef", "core": "compiled", "hardware": {}}]
    write_json(made_by, folder / "tiny/provenance.json")
    (folder / "tiny/tables.md").write_text("| one |\n\n| two |\n", encoding="utf-8")
    return Results(folder, {"tiny": experiment}, PLOTTED, NO_PAIRS)


@pytest.fixture
def rendered(tmp_path):
    """Gives the page of a template with some text, without the notice at its top."""

    def render_text(text, source):
        template = tmp_path / "try.md.jinja"
        template.write_text(text, encoding="utf-8")
        return render(template, source, ROOT).partition("\n")[2]

    return render_text


EVERYTHING = """{{ provenance }}
{{ claim("gain") }}; {{ value("gain") }}; {{ paper("gain") }}; {{ verdict("gain") }}; {{ sample("gain") }}
{{ inverse("gain") }}; {{ retained("gain") }}; {{ reason("lost") }}; {{ span("gain", "gain") }}
{{ count() }}: {{ counts() }}
{{ (number("gain") / 2) | short }} {{ difference("gain") | unsigned }} {{ engine_time.fitted_to.points | length }}
{{ claims_table(group="paper") }}
{{ capacity("tiny", "a", "fcfs") }}; {{ load_difference("tiny", "a", "fcfs") }}
{{ table_of("tiny", rows="panel") }}
{{ table_of("tiny", against="paper") }}
{{ loads_table("tiny", series=["fcfs"]) }}
{{ target("tiny", "T") }} {{ met("tiny", "T") }} {{ target_value("tiny", "T") }}
{{ targets_table("tiny") }}
{{ measured("ratio", "tiny", panel="a", of="fastserve", over="fcfs", x=4) }}
{{ value_at("tiny", "b", "fcfs", 4, "mean_jct_s") }}; {{ ratio("tiny", of="fastserve", over="fcfs", at=4) }}
{{ ratio("tiny", of="fastserve", over="fcfs", panels="b", statistic="largest") }}
{{ wins("tiny", of="fastserve", over="fcfs", panels=["a", "b"], at=[1, 4]) }}
{{ ratios_table("tiny", {"FastServe": "fastserve"}, "fcfs", {"A": "a", "B": "b"}, at=4) }}
{{ comparison("tiny", "a", "over FCFS") }}
{{ comparisons_table("tiny") }}
{{ false_alarms() }}
{{ ready_table("tiny", 2) }}
"""


def test_the_committed_pages_are_the_templates_filled_with_the_committed_tables():
    recorded = Recorded(TABLES)
    found = templates(TEMPLATES)
    assert {page_name(template) for template in found} >= {"reproduction.md", "own-policy.md", "gpu-truth.md"}
    for template in found:
        page = render(template, recorded, ROOT)
        same = compared(page, ROOT / "docs" / page_name(template))
        assert same.startswith("equal to"), f"{same}\nrun `python tools/write_pages.py --recorded` after an edit"


def test_the_committed_tables_say_where_they_come_from():
    assert re.match(
        r"Commit [0-9a-f]{10}.*; seeds a claim: \d.*; (compiled|pure).* core\.$", Recorded(TABLES).provenance
    )
    lines = {
        path.read_text(encoding="utf-8").partition("\n")[0] for path in TABLES.iterdir() if path.stem != "fidelity"
    }
    assert len(lines) == 1  # All of one pipeline.


def test_templates_have_no_number_with_an_interval():
    for template in templates(TEMPLATES):
        typed = re.findall(r"\d\.\d+ \(\d+\.\d+ to \d+\.\d+\)", template.read_text(encoding="utf-8"))
        assert not typed, f"{template}: take {typed[0]} from a table"


def test_every_function_gives_what_is_in_the_tables(results, rendered):
    lines = rendered(EVERYTHING, results).splitlines()
    assert lines[0] == "Commit 0123456789; seeds a claim: 3 (1 claims); compiled core."
    table = results.claims().set_index("id").loc["gain"]
    assert table["value"] == pytest.approx(1.5, abs=0.02)
    said = f"{table['value']:.2f} ({table['low']:.2f} to {table['high']:.2f})"
    sample = f"{table['sample_low']:.2f} to {table['sample_high']:.2f}"
    assert lines[1] == f"{said}; 1.50; 1.5 to 1.75; {table['verdict']}; {sample}"
    assert lines[2].endswith("R.; 1.50 to 1.50")
    assert lines[3] == f"2: 1 {table['verdict']}, 1 untestable"
    assert lines[2].startswith("0.67 (0.6")
    text = "\n".join(lines)
    assert (
        "| claim | paper | ours (95 %) | one sample (95 %) | effect retained | verdict |" in text
    )  # No rerun: no column.
    assert "| Lost | 3 | not measured |  |  | untestable |" in text
    assert f"{said}\n| load of one over another | OPT-13B | OPT-13B \\| again |\n" in text
    assert f"| **paper** | 2.03 |  |\n| over FCFS | {short(table['value'])} | 1.50 |" in text  # No rerun: no row.
    assert "A series against itself, 1 seeds a side: " not in text  # Three seeds are too few.
    load = results.table("capacity", "tiny").iloc[0]
    assert f"{load['capacity']:.2f} ({load['low']:.2f} to {load['high']:.2f}); " in text
    assert percent(load["capacity"] / load["paper_capacity"] - 1) in text
    assert "| panel | FCFS | FastServe |" in text
    assert "| OPT-13B \\| again | 2.00 (1.9" in text  # A | in a title does not end the cell.
    assert f"| OPT-13B | {short(load['capacity'])} ({percent(load['relative_difference'])}) | " in text
    assert "1.00 (1.00 to 1.00) met 1.00" in text
    # The metric of `over` over that of `of`, as in a claim: 0.7 over 0.4. Then the mean completion time of FCFS.
    assert "\n1.75 (1.75 to 1.75)\n70.0; 0.57 (0.57 to 0.57)\n1.00 (1.00 to 1.00)\n" in text
    assert "\n2 of 4 (in 2 the whole interval is below 1)\n" in text  # At x = 1 both are equal.
    assert "| A | 0.57 (0.57 to 0.57) |\n| B | 0.57 (0.57 to 0.57) |\n| all of these | 0.57 (0.57 to 0.57) |" in text
    assert text.endswith("| two |")


def test_what_a_page_takes_is_recorded_and_gives_the_same_page(results, rendered, tmp_path):
    fresh = rendered(EVERYTHING, results)
    record(results, tmp_path / "tables")
    write_recorded(NO_PAIRS, "Nothing.", tmp_path / "tables/fidelity.csv")
    recorded = Recorded(tmp_path / "tables")
    assert rendered(EVERYTHING, recorded) == fresh
    assert len(read_recorded(tmp_path / "tables/measures.csv")[0]) == 9  # Each measure once.
    with pytest.raises(ConfigError, match=r"no measure .* needs fresh tables: `make reproduce`, then `python tools"):
        rendered('{{ value_at("tiny", "b", "fcfs", 1) }}', recorded)
    with pytest.raises(ConfigError, match="no capacity of experiment 'tine'; did you mean 'tiny'"):
        rendered('{{ capacity("tine", "a", "fcfs") }}', recorded)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n{{ claim('gian') }}", r"try\.md\.jinja:2: no claim 'gian'; did you mean 'gain'\?$"),
        ("{{ claim('lost') }}", "claim 'lost' has no value: R."),
        ("{{ number('gain', 'valeu') }}", "no column of claims.csv 'valeu'; did you mean 'value'"),
        ("{{ count('reproduced') }}", "no verdict 'reproduced'; there are: consistent, attenuated"),
        ("{{ claims_table(group='papr') }}", "no group in the table 'papr'; did you mean 'paper'"),
        ("{{ capacity('fig11', 'a', 'fcfs') }}", "no experiment 'fig11'; there are: tiny"),
        ("{{ capacity('tiny', 'c', 'fcfs') }}", "no panel of tiny 'c'; there are: a, b"),
        ("{{ capacity('tiny', 'a', 'fcf') }}", "no series in panel 'a' of tiny 'fcf'; did you mean 'fcfs'"),
        ("{{ load('tiny', 'b', 'fcfs', 'paper') }}", "tiny, panel 'b', series 'fcfs' has no load of paper"),
        ("{{ target('tiny', 'U') }}", "no target of tiny 'U'; there are: T"),
        ("{{ ready_table('tiny', 3) }}", "tiny has 2 tables, not a table 3"),
        ("{{ measured('ratoi', 'tiny', of='fcfs') }}", "ratoi"),
        ("{{ ratio('tiny', of='fcfs', over='fastsrve') }}", "no series in 'Tiny' 'fastsrve'; did you mean 'fastserve'"),
        ("{{ ratio('tiny', of='fcfs', over='fastserve', metric='latency') }}", "metric must be a metric of points.csv"),
        ("{{ agreement('fidelity') }}", "no recorded fidelity experiment 'fidelity'; there are: none"),
        ("a\nb {{ clam('gain') }}", r"try\.md\.jinja:2: 'clam' is undefined"),
        ("a\n{{ claim('gain' }}", r"try\.md\.jinja:2: "),
        ("{{ claim() }}", r"try\.md\.jinja:1: .*missing 1 required positional argument: 'name'"),
    ],
)
def test_what_is_not_there_is_named_with_the_line_of_the_template(results, rendered, text, message):
    with pytest.raises(ConfigError, match=message):
        rendered(text, results)


def test_missing_results_are_named_with_the_remedy(results, rendered, tmp_path):
    (tmp_path / "results/tiny/capacity.csv").unlink()
    with pytest.raises(ConfigError, match=r"there is no .*tiny/capacity\.csv; run `make reproduce` first"):
        rendered('{{ capacity("tiny", "a", "fcfs") }}', results)
    with pytest.raises(ConfigError, match=r"cannot read .*claims\.csv: No such file"):
        read_recorded(tmp_path / "claims.csv")
    (tmp_path / "claims.csv").write_text("id\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"must begin with a line of provenance, '# Commit …', not 'id'"):
        read_recorded(tmp_path / "claims.csv")


def test_every_public_function_says_what_it_gives():
    assert all(function.__doc__ for function in functions_on(Recorded(TABLES)).values())
    documented = (TEMPLATES / "README.md").read_text(encoding="utf-8")
    for name in functions_on(Recorded(TABLES)):
        assert f"`{name}(" in documented, f"workflows/report/pages/README.md does not list {name}"


def test_templates_name_claims_and_experiments_that_there_are():
    config = ROOT / "workflows/config"
    claims = {each["id"] for each in read_yaml(config / "claims.yaml")["claims"]}
    experiments = {path.stem for path in (config / "experiments").glob("*.yaml")}
    unknown = []
    for template in templates(TEMPLATES):
        for i, line in enumerate(template.read_text(encoding="utf-8").splitlines(), 1):
            calls = re.findall(r"\b(\w+)\(((?:\s*\"[^\"]+\",?)+)", line)
            assert {function for function, _ in calls} <= ONE_CLAIM | ONE_EXPERIMENT | {"measured", "measured_number"}
            for function, texts in calls:
                names = re.findall(r"\"([^\"]+)\"", texts)
                names, known = (names, claims) if function in ONE_CLAIM else (names[:1], experiments)
                unknown += [f"{template.name}:{i}: {name}" for name in names if name not in known]
    assert not unknown, "not in workflows/config: " + ", ".join(unknown)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((2.6, "2.60"), (0.987, "0.99"), (16.886, "16.9"), (146.2, "146"), (1155.4, "1,155"), (0.0375, "0.0375")),
        *((99.97, "100"), (9.996, "10.0"), (0.0, "0"), (-2.5, "-2.50"), (3, "3.00"), (np.nan, ""), (None, "")),
    ],
)
def test_numbers_have_few_digits(value, text):
    assert short(value) == text


@given(st.floats(1e-6, 1e7))
def test_a_short_number_is_off_by_less_than_its_last_digit(value):
    assert float(short(value).replace(",", "")) == pytest.approx(
        value, rel=0.006, abs=0.00501 if value >= 0.0995 else 0
    )


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ((2.6, 2.54, 2.66), "2.60 (2.54 to 2.66)"),
        ((1.03, 1.01, np.inf), "1.03 (from 1.01)"),
        ((1.03, -np.inf, 1.1), "1.03 (up to 1.10)"),
        ((np.nan, 1.12, np.inf), "more than 1.12"),
        ((None, 0.0, 4.0), "less than 4.00"),
        ((None, 0.0, np.inf), ""),
        ((2.0, None, None), "2.00"),
        ((None, 1.0, 2.0), ""),
    ],
)
def test_open_ends_are_said(bounds, text):
    assert with_interval(*bounds) == text


def test_per_cents_and_tables():
    assert [percent(share) for share in (0.276, -0.4, 0.001, -0.001, None, np.nan)] == [
        "+28 %",
        "-40 %",
        "0 %",
        "0 %",
        "",
        "",
    ]
    assert unsigned("-40 %") == "40 %"
    assert interval(np.nan, 1.0) == ""
    assert markdown(["a", "b"], [["1", "x|y"], ["", "2"]]) == "| a | b |\n|---|---|\n| 1 | x\\|y |\n|  | 2 |"
    with pytest.raises(ConfigError, match="the table has no rows"):
        markdown(["a"], [])


def test_a_fresh_page_is_compared_line_by_line(tmp_path):
    committed = tmp_path / "page.md"
    assert "there is no" in compared("a\n", committed)
    committed.write_text("a\nb\nc\n", encoding="utf-8")
    assert compared("a\nb\nc\n", committed) == f"equal to {committed}"
    said = compared("a\nB\nc\nd\n", committed).splitlines()
    assert said == [f"2 lines differ from {committed}:", "-b", "+B", "+d"]
    assert compared("a\nc\n", committed).startswith("1 lines differ")  # A line that is missing counts too.


def test_a_page_of_the_recorded_tables_is_written_whole(tmp_path):
    paths = write_of(Recorded(TABLES), tmp_path)
    for path in paths:
        assert path.read_text(encoding="utf-8") == (ROOT / "docs" / path.name).read_text(encoding="utf-8")


def test_figures_that_a_page_shows_are_copied_if_they_were_drawn(tmp_path):
    figures, images = tmp_path / "figures", tmp_path / "images"
    for folder in (figures, images):
        folder.mkdir()
    for name in ("a.png", "c.png"):
        (figures / name).write_text(name, encoding="utf-8")
    (images / "b.png").write_text("old", encoding="utf-8")
    copy_figures("![x](images/a.png) ![y](images/b.png)", figures, images)
    assert {path.name: path.read_text() for path in images.iterdir()} == {"a.png": "a.png", "b.png": "old"}


def test_measured_pairs_are_added_run_by_run(tmp_path):
    folder, path = tmp_path / "fidelity", tmp_path / "tables/fidelity.csv"
    (folder / "runs/fastserve/load-0.5/real").mkdir(parents=True)
    rows = [("fastserve", 0.5, "mean_jct_s", 0.02), ("fastserve", 0.5, "mean_ttft_s", -0.15)]
    table = pd.DataFrame(rows, columns=["series", "load", "metric", "error"]).assign(label="FastServe", seed=0)
    write_csv(table.assign(real=1.0, sim=1 + table["error"], within=table["error"].abs() <= 0.1), folder / "pairs.csv")
    meta = {
        "commit": "c" * 40,
        "core": "compiled",
        "hardware": {"cpu": "CPU", "cores": 2},
        "created_at": "2026-11-28T01",
    }
    write_json(meta, folder / "runs/fastserve/load-0.5/real/meta.json")
    add_fidelity([folder], path)
    add_fidelity([folder], path)
    pairs, provenance = read_recorded(path)
    assert pairs["run"].tolist() == [1, 1, 2, 2]
    assert provenance.count("compiled core, CPU of 2 cores, 2026-11-28.") == 2

    class Pairs:
        def fidelity(self):
            return pairs

    functions = functions_on(Pairs())
    assert functions["agreement"]("fidelity") == (
        "2 of 4 pairs in 2 runs; the worst is -15 % (FastServe, load 0.5, `mean_ttft_s`), the median 8.5 %"
    )
    assert functions["agreement"]("fidelity", metric="mean_jct_s").startswith(
        "2 of 2 pairs in 2 runs; the worst is +2 %"
    )
    assert functions["pairs_table"]("fidelity").endswith("| FastServe, load 0.5 | +2 %, +2 % | -15 %, -15 % |")
    with pytest.raises(ConfigError, match=r"there is no .*nowhere/pairs\.csv; run snakemake's target nowhere first"):
        add_fidelity([tmp_path / "nowhere"], path)


def test_a_page_may_be_rendered_again_and_again(results, rendered):
    assert rendered(EVERYTHING, results) == rendered(EVERYTHING, results)
    assert {name for name, parts in results.taken.items() if parts} == {
        "capacity",
        "comparisons",
        "targets",
        "measures",
        "a-a",
    }

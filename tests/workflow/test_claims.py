import math
from pathlib import Path

import pandas as pd
import pytest

from fastserve.core.errors import ConfigError
from harness.analysis.claims import COLUMNS, Claims, check_claims, claims_table
from harness.analysis.measures import Evidence
from harness.analysis.points import load_reported
from harness.experiments.experiment import Experiment, Series
from harness.experiments.files import parse_as, read_yaml
from harness.experiments.folder import read_experiments
from harness.report.captions import Finding, findings
from harness.report.claims_page import claims_page

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
CLAIMS = parse_as(Claims, read_yaml(WORKFLOWS / "config" / "claims.yaml"), "claims.yaml").claims
EXPERIMENT = Experiment.model_validate(
    {
        "title": "t",
        "figure": "load",
        "backend": "sim",
        "seeds": [0, 1, 2],
        "slo": 0.3,
        "points": [{"rate": 1}, {"rate": 2}],
        "series": [{"name": name, "label": name, "policy": name} for name in ("fast", "slow")],
    }
)


def points(fast, slow, **columns):
    """Values at rates 1 and 2 for seeds 0 to 2."""
    rows = [
        {"panel": "", "series": series, "seed": seed, "x": x, "mean_normalized_latency_s": values[x - 1] + 0.001 * seed}
        for series, values in (("fast", fast), ("slow", slow))
        for seed in (0, 1, 2)
        for x in (1, 2)
    ]
    return pd.DataFrame(rows).assign(**columns)


def claim(kind="capacity_ratio", **changes):
    measure = {"kind": kind} if kind == "none" else {"kind": kind, "experiment": "e", "of": "fast"}
    if kind.endswith("ratio") and kind != "x_ratio":
        measure |= {"over": "slow"}
    measure |= changes.pop("measure", {})
    return {"id": "c", "group": "paper", "claim": "C", "source": "S", "measure": measure} | changes


def parsed(*claims):
    """As the pipeline reads them."""
    read = parse_as(Claims, {"claims": list(claims)}, "claims.yaml")
    check_claims(read, {"e": EXPERIMENT}, "claims.yaml")
    return read.claims


def evidence(table, reported=None, experiment=EXPERIMENT):
    return {"e": Evidence(experiment, table, pd.DataFrame() if reported is None else reported)}


def judged(claim_, table):
    (row,) = claims_table(parsed(claim_), evidence(table)).to_dict("records")
    return row


def test_a_ratio_of_capacities():
    row = judged(claim(paper=1.5), points(fast=[0.0, 0.4], slow=[0.2, 1.2]))
    assert tuple(row) == COLUMNS
    assert row["value"] == pytest.approx(1.75 / 1.1, rel=0.01)
    assert row["sample_low"] < row["low"] < row["value"] < row["high"] < row["sample_high"]
    assert row["retained_effect"] == pytest.approx(math.log(row["value"]) / math.log(1.5))
    assert (row["num_seeds"], row["verdict"]) == (3, "consistent")
    assert 0 < row["p_value"] == row["q_value"] < 0.05  # the only one of its family


@pytest.mark.parametrize(
    ("paper", "relation", "verdict"),
    [
        (1.6, "equal", "consistent"),
        (1.85, "equal", "consistent"),
        (1.9, "equal", "attenuated"),
        (3.5, "equal", "direction only"),
        (1.3, "equal", "direction only"),
        (0.7, "equal", "contradicted"),
        ([1.3, 1.7], "equal", "consistent"),
        ([1.9, 2.7], "equal", "attenuated"),
        (9, "at_most", "consistent"),
        (9, "at_least", "direction only"),
        (1.2, "at_least", "consistent"),
    ],
)
def test_verdicts_on_a_gain(paper, relation, verdict):
    assert judged(claim(paper=paper, relation=relation), points([0.0, 0.4], [0.2, 1.2]))["verdict"] == verdict


def test_a_gain_that_is_a_loss_is_contradicted():
    row = judged(claim(paper=2), points(fast=[0.2, 1.2], slow=[0.0, 0.4]))
    assert row["verdict"] == "contradicted"
    assert row["retained_effect"] < 0


def test_only_the_papers_claims_are_judged():
    for group in ("inconsistency", "suspicion", "beyond"):
        row = judged(claim(group=group, paper=1.5), points([0.0, 0.4], [0.2, 1.2]))
        assert (row["verdict"], row["q_value"]) == ("found", None)


def test_other_measures():
    table = points([0.1, 0.2], [0.2, 0.8], mean_swapping_s=0.5, mean_jct_s=10.0)
    assert judged(claim("ratio", measure={"x": 2}), table)["value"] == pytest.approx(4, rel=0.01)
    assert judged(claim("largest_ratio"), table)["value"] == pytest.approx(4, rel=0.01)
    assert judged(claim("value", measure={"x": 1}), table)["value"] == pytest.approx(0.101)
    assert judged(claim("capacity", measure={"of": "slow"}), table)["value"] == pytest.approx(1.166, abs=0.01)
    share = claim("largest_share", measure={"metric": "mean_swapping_s", "share_of": "mean_jct_s"}, paper=5)
    assert judged(share, table)["value"] == pytest.approx(5)


def test_the_largest_ratio_over_several_series_is_that_over_the_worst_of_them():
    table = points([0.1, 0.2], [0.2, 0.8])
    both = judged(claim("largest_ratio", measure={"over": ["fast", "slow"]}), table)
    assert both["value"] == pytest.approx(judged(claim("largest_ratio"), table)["value"])
    with pytest.raises(ConfigError, match="over 'fsat' is not in e: fast, slow"):
        parsed(claim("largest_ratio", measure={"over": ["slow", "fsat"]}))


def test_one_metric_over_another_of_the_same_series():
    table = points([0.1, 0.2], [0.2, 0.8], mean_jct_s=10.0)
    measure = {"of": "slow", "x": 2, "metric": "mean_jct_s", "over_metric": "mean_normalized_latency_s"}
    row = claim("value", group="inconsistency", measure=measure)
    row["measure"]["kind"] = "metric_ratio"
    assert judged(row, table)["value"] == pytest.approx(10 / 0.8005, rel=0.01)


def test_ratios_along_one_curve_take_x_as_number_or_text():
    table = points([0.1, 0.2], [0.2, 0.8])
    row = claim("x_ratio", measure={"of": "slow", "x": "2", "over_x": 1})
    assert judged(row, table)["value"] == pytest.approx(4, rel=0.01)
    never = table.assign(x=table["x"].map({1: "0.3", 2: "never"}))
    row = claim("x_ratio", measure={"of": "slow", "x": "never", "over_x": 0.3})
    assert judged(row, never)["value"] == pytest.approx(4, rel=0.01)


def test_sorting_the_papers_points_by_latency_gives_another_capacity_than_their_first_crossing():
    experiment = EXPERIMENT.model_copy(
        update={"series": [Series(name="fast", label="fast", policy="fastserve", paper_system="Fast")]}
    )
    reported = pd.DataFrame(
        {"panel": "p", "source": "paper", "system": "Fast", "rate": [1, 2, 3, 4], "value": [0.1, 0.5, 0.2, 0.4]}
    )
    rows = [
        {**claim(kind, measure={"panel": "p"}), "id": kind.replace("_", "-"), "group": "suspicion"}
        for kind in ("reported", "reported_sorted")
    ]
    claims = parse_as(Claims, {"claims": rows}, "claims.yaml").claims
    table = claims_table(claims, evidence(pd.DataFrame(), reported, experiment))
    assert table["value"].tolist() == pytest.approx([1.5, 3.5])


def test_two_variants_of_one_system_have_no_rerun():
    series = [Series(name=name, label=name, policy="fastserve", paper_system="Fast") for name in ("fast", "slow")]
    experiment = EXPERIMENT.model_copy(update={"series": series})
    curve = {"panel": "", "source": "rerun", "system": "Fast", "rate": [1, 2], "value": [0.1, 0.5]}
    ours = points(fast=[0.0, 0.4], slow=[0.2, 1.2])
    row = claims_table(parsed(claim(paper=2)), evidence(ours, pd.DataFrame(curve), experiment))
    assert row["rerun"].isna().all()


def test_what_cannot_be_measured_says_why():
    with pytest.raises(ConfigError, match="give a reason"):
        parsed(claim("none"))
    row = judged(claim("none", paper=31.4, reason="No such fits."), points([0, 0.4], [0, 0.4]))
    assert (row["verdict"], row["reason"]) == ("untestable", "No such fits.")
    assert all(pd.isna(row[column]) for column in ("num_seeds", "value", "retained_effect", "q_value"))


def test_two_seeds_leave_a_claim_untestable_and_say_so():
    table = points([0.0, 0.4], [0.2, 1.2])
    row = judged(claim(paper=2), table[table["seed"] < 2])
    assert (row["verdict"], row["reason"]) == ("untestable", "(no interval: it needs 3 seeds.)")


def test_an_objective_never_reached_is_said():
    row = judged(claim(paper=2), points(fast=[0.0, 0.1], slow=[0.2, 1.2]))
    assert (row["low"] > 1.7, row["high"], row["verdict"]) == (True, math.inf, "consistent")  # at least 2 / 1.1
    assert judged(claim(paper=1.2), points(fast=[0.0, 0.1], slow=[0.2, 1.2]))["verdict"] == "direction only"
    assert "within the SLO at every rate" in row["reason"]


def test_the_rerun_is_measured_as_ours_is():
    experiment = EXPERIMENT.model_copy(
        update={
            "series": [
                Series(name=name, label=name, policy=name, paper_system=name.title()) for name in ("fast", "slow")
            ]
        }
    )
    curves = {("paper", "Fast"): [0.1, 0.5], ("rerun", "Fast"): [0.1, 0.4], ("rerun", "Slow"): [0.2, 1.2]}
    reported = pd.DataFrame(
        [
            {"panel": "", "source": source, "system": system, "rate": rate, "value": value}
            for (source, system), values in curves.items()
            for rate, value in enumerate(values, 1)
        ]
    )
    rows = [
        claim(paper=2),
        {**claim("capacity", measure={"of": "slow"}), "id": "load"},
        {**claim(measure={"metric": "p95_jct_s"}), "id": "other-metric"},
        {**claim("ratio", measure={"x": 1}), "id": "other-measure"},
    ]
    ours = points([0.0, 0.4], [0.2, 1.2]).assign(p95_jct_s=1.0)
    found = claims_table(parsed(*rows), evidence(ours, reported, experiment))["rerun"]
    assert found[:2].tolist() == pytest.approx([(1 + 2 / 3) / 1.1, 1.1])
    assert found[2:].isna().all()
    without = claims_table(parsed(*rows), evidence(ours, reported.iloc[:2], experiment))["rerun"]
    assert without.isna().all()


@pytest.mark.parametrize("is_above", [True, False])
def test_an_open_prediction_interval_is_said(is_above):
    """One seed alone does not cross; the mean curves do."""
    table = points(fast=[0.0, 0.4], slow=[0.2, 1.2])
    changed = "fast" if is_above else "slow"
    table.loc[(table["series"] == changed) & (table["seed"] == 1) & (table["x"] == 2), "mean_normalized_latency_s"] = (
        0.29
    )
    row = judged(claim(paper=9 if is_above else 1.01), table)
    assert (row["sample_high"] == math.inf, row["sample_low"] == 0) == (is_above, not is_above)
    assert (row["verdict"], "the prediction interval is open" in row["reason"]) == ("consistent", True)


def test_reasons_quote_other_rows():
    rows = [claim(paper=2, reason="Because of {other}."), {**claim(), "id": "other"}]
    table = claims_table(parsed(*rows), evidence(points([0.0, 0.4], [0.2, 1.2])))
    assert table["reason"][0].startswith("Because of 1.59 (")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measure": {"experiment": "f"}}, "no experiment 'f'; there are: e"),
        ({"measure": {"of": "fsat"}}, "of 'fsat' is not in e: fast, slow"),
        ({"measure": {"panel": "p"}}, "panel 'p'"),
        ({"reason": "See {that}."}, "claims that are not there: that"),
    ],
)
def test_claims_about_what_is_not_there_are_refused(change, message):
    with pytest.raises(ConfigError, match=rf"^claims\.yaml: claim 'c': .*{message}"):
        parsed(claim(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kind": "capacity_ratoi"},
            "measure.kind must be one of 'capacity', 'capacity_ratio', .*'capacity_ratoi'",
        ),
        ({"measure": {"ovr": "slow"}}, "claims 'c': measure: unknown key 'ovr'; did you mean 'over'"),
        ({"kind": "value"}, "claims 'c': measure.x is missing"),
        ({"kind": "capacity", "measure": {"over": "slow"}}, "unknown key 'over'; valid keys: experiment, panel, of"),
        ({"paper": "much"}, "paper must be a number, or a list of them, not 'much'"),
        ({"retest_spread": 0}, "retest_spread must be a number above 0, not 0"),
        ({"tuned": ""}, "tuned must be a text of at least one character, not ''"),
        ({"tolerance": 0.2}, "unknown key 'tolerance'"),
        ({"group": "other"}, "group must be one of 'paper', 'inconsistency', 'suspicion' or 'beyond', not 'other'"),
        ({"id": "C 1"}, "claims 'C 1': id must be a name of small letters and digits"),
    ],
)
def test_typos_in_claims_are_refused(change, message):
    with pytest.raises(ConfigError, match=rf"^claims\.yaml: .*{message}"):
        parsed(claim(**change))


def test_two_claims_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="ids of claims must differ, 'c' is there twice"):
        parsed(claim(), claim())


EXPERIMENTS = read_experiments(WORKFLOWS / "config" / "experiments")
PLOTTED = WORKFLOWS / "data" / "reported_points.csv", WORKFLOWS / "data" / "artifact_rerun_points.csv"


def plotted(measure, kind="reported", **changes):
    """The same measure on the points that the paper plotted."""
    experiment = EXPERIMENTS[measure.experiment]
    panel = measure.panel or experiment.panels[0].name
    keys = {key: getattr(measure, key, None) for key in ("experiment", "of", "over")} | {"panel": panel, "kind": kind}
    row = {**claim(), "group": "inconsistency", "measure": {k: v for k, v in (keys | changes).items() if v is not None}}
    (read,) = parse_as(Claims, {"claims": [row]}, "claims.yaml").claims
    return read.measure.estimate(Evidence(experiment, pd.DataFrame(), load_reported(*PLOTTED, experiment))).value


@pytest.mark.parametrize(
    "row", [row for row in CLAIMS if row.group == "paper" and "first crossing" in row.source], ids=lambda row: row.id
)
def test_the_papers_values_are_the_crossings_of_its_own_points(row):
    assert row.measure.kind in ("capacity", "capacity_ratio")
    assert row.paper == pytest.approx(plotted(row.measure), rel=0.005)


def test_figures_11_12_14_15_and_18_have_a_row_for_every_system():
    sides = {}
    for row in CLAIMS:
        if row.group == "paper" and row.measure.kind == "capacity_ratio":
            sides.setdefault((row.measure.experiment, row.measure.panel), set()).add(row.measure.over)
    for panel in EXPERIMENTS["fig11"].panels:
        assert sides["fig11", panel.name] == {"fastserve-fcfs", "vllm-400", "run-to-completion"}
    assert {frozenset(over) for (name, _), over in sides.items() if name in ("fig12", "fig13", "fig14")} == {
        frozenset({"fastserve-fcfs", "vllm-400"})
    }
    assert {frozenset(over) for (name, _), over in sides.items() if name == "fig18"} == {
        frozenset({"vllm-400", "vllm-chunked-400"})
    }
    loads = [row.measure for row in CLAIMS if row.group == "paper" and row.measure.kind == "capacity"]
    assert len({(load.panel, load.of) for load in loads}) == len(loads) == 24


def test_no_two_rows_of_the_paper_are_one_measurement():
    measures = [row.measure.model_dump_json() for row in CLAIMS if row.measure.kind != "none"]
    assert len(set(measures)) == len(measures)


NOTEBOOKS = [row for row in CLAIMS if row.measure.kind == "reported_sorted" and row.paper is not None]


@pytest.mark.parametrize("row", NOTEBOOKS, ids=lambda row: row.id)
def test_the_notebooks_numbers_come_from_sorted_points(row):
    assert row.group == "inconsistency"
    assert plotted(row.measure, "reported_sorted") == pytest.approx(row.paper, rel=0.002)


def test_claims_on_the_authors_rerun():
    measure = next(row.measure for row in CLAIMS if row.id == "f11-13b-s-fcfs")
    assert plotted(measure, source="rerun") == pytest.approx(1.84, abs=0.005)


def test_every_claim_of_the_paper_has_a_value():
    for row in CLAIMS:
        assert row.group != "paper" or row.paper is not None, row.id


def test_the_page_and_the_captions_hold_every_claim(tmp_path):
    rows = [claim(paper=2, claim="A <gain>", tuned="the <skew>"), {**claim(), "id": "d", "group": "beyond"}]
    table = claims_table(parsed(*rows), evidence(points([0.0, 0.4], [0.2, 1.2])))
    counts = {
        "experiment": "e",
        "seeds_a_side": [5, 10],
        "comparisons": [1000, 10],
        "wins": [47, 0],
        "wins_adjusted": 0,
    }
    itself = pd.DataFrame(counts)
    page = claims_page(table, itself)
    assert "5 seeds a side: 4.7 % of 1,000 intervals show a difference" in page
    assert "A &lt;gain&gt;" in page
    assert "Tuned on these points: the &lt;skew&gt;." in page
    assert page.count("<tr><td>") == 2
    assert "http" not in page
    assert "nan" not in page
    captions = findings(table, itself)
    assert captions["e"].count("\n* ") == 3
    assert "10 seeds a side: 0.0 % of 10 intervals" in captions["e"]
    assert findings(table, itself.iloc[:0])["e"].count("\n* ") == 1
    assert "(tuned on these points: the <skew>)" in captions["e"]
    path = tmp_path / "captions.json"
    finding = Finding("e", str(path))
    assert (finding.text(), repr(finding)) == ("", "Finding('e')")
    path.write_text('{"e": "* found"}', encoding="utf-8")
    assert (finding.text(), repr(finding)) == ("* found", "Finding('e')")
    assert not math.isnan(table["value"][0])

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from jsonschema import Draft202012Validator

from fastserve.core.errors import ConfigError
from harness.analysis.claims import Claims, check_claims
from harness.analysis.points import capacity_table, load_reported
from harness.experiments import points
from harness.experiments.batches import batches_of
from harness.experiments.configuration import read_configuration
from harness.experiments.experiment import Experiment
from harness.experiments.files import json_schema, parse_as, read_yaml
from harness.experiments.folder import linked, read_experiments
from harness.experiments.points import check_runs, points_of, run_name
from harness.run.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / "workflows"
CONFIG = WORKFLOWS / "config"
PLOTTED = WORKFLOWS / "data/reported_points.csv", WORKFLOWS / "data/artifact_rerun_points.csv"
MODELS = {"experiment": Experiment, "claims": Claims}


def shipped(folder="experiments"):
    return read_experiments(CONFIG / folder)


def parsed(content):
    """As the pipeline reads an experiment."""
    experiment = parse_as(Experiment, content, "tiny.yaml")
    check_runs(experiment, "tiny.yaml")
    return experiment


def is_in_schema(content):
    return Draft202012Validator(json_schema(Experiment)).is_valid(content)


def tiny(**changes):
    return {
        "title": "Tiny",
        "figure": "load",
        "backend": "sim",
        "seeds": [0, 1],
        "slo": 0.3,
        "run": {
            "trace": "sharegpt",
            "arrivals": "poisson",
            "profile": "a100-80g/opt-13b-tp1",
            "profile_suffix": "-swifttransformer",
            "num_requests": 20,
        },
        "points": [{"rate": 1}, {"rate": 2, "num_requests": 30}],
        "series": [
            {"name": "vllm", "label": "vLLM", "policy": "vllm", "run": {"profile_suffix": "-vllm"}},
            {"name": "fastserve", "label": "FastServe", "policy": "fastserve", "run": {"settings": {"alpha_s": 1}}},
        ],
    } | changes


TARGET = {
    "claim": "Faster",
    "metric": "mean_jct_s",
    "of": "fastserve",
    "over": "vllm",
    "statistic": "geometric_mean",
    "at_most": 0.8,
}


@pytest.mark.parametrize("name", ["config", "experiment", "claims"])
def test_the_schemas_for_editors_are_those_of_the_models(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    from write_schemas import FOLDER, schema_text

    text = (FOLDER / f"{name}.schema.json").read_text(encoding="utf-8")
    assert text == schema_text(name), "write them again: python tools/write_schemas.py"
    Draft202012Validator.check_schema(json.loads(text))


@pytest.mark.parametrize("folder", ["experiments", "smoke", "external"])
def test_shipped_experiments_are_valid_and_written_down_without_loss(folder):
    files = {path.stem: read_yaml(path) for path in (CONFIG / folder).glob("*.yaml")}
    for name, content in linked(files).items():
        assert is_in_schema(content), name
    for experiment in shipped(folder).values():
        assert Experiment.model_validate(experiment.as_written()) == experiment


def test_every_figure_of_the_paper_and_every_group_has_experiments():
    groups = {name.partition("-")[0] for name in shipped()}
    assert {f"fig{i}" for i in range(11, 19)} | {"synthetic", "beyond", "fidelity"} <= groups


def test_simulated_experiments_have_at_least_five_seeds():
    for name, experiment in shipped().items():
        if experiment.figure == "measured":  # Requests and arrivals of one recorded run: a seed changes nothing.
            assert len(experiment.seeds) == 1, name
        else:
            assert experiment.backend != "sim" or len(experiment.seeds) >= 5, name


def test_claims_name_what_there_is():
    content = read_yaml(CONFIG / "claims.yaml")
    assert Draft202012Validator(json_schema(Claims)).is_valid(content)
    claims = parse_as(Claims, content, "claims.yaml")
    check_claims(claims, shipped(), "claims.yaml")
    assert Claims.model_validate(claims.model_dump(exclude_unset=True)) == claims


def test_a_run_is_its_four_parts_and_the_later_ones_win():
    experiment = parsed(
        tiny(
            run={"trace": "sharegpt", "arrivals": "poisson", "settings": {"max_batch_size": 8}, "num_requests": 5},
            panels=[
                {
                    "name": "a",
                    "run": {"profile": "a100-80g/opt-13b-tp1", "settings": {"token_budget": 512}},
                },
                {
                    "name": "b",
                    "run": {"profile": "a100-80g/opt-66b-tp4"},
                    "points": [{"rate": 3, "x": "fast"}],
                },
            ],
        )
    )
    points = list(points_of(experiment))
    assert [(point.panel, point.series, point.x, point.config.seed) for point in points] == [
        *(("a", series, x, seed) for series in ("vllm", "fastserve") for x in (1, 2) for seed in (0, 1)),
        *(("b", series, "fast", seed) for series in ("vllm", "fastserve") for seed in (0, 1)),
    ]
    first = points[0].config
    assert (first.profile, first.num_requests, first.rate) == ("a100-80g/opt-13b-tp1-vllm", 5, 1.0)
    assert first.settings == {"max_batch_size": 8, "token_budget": 512}
    assert points[2].config.num_requests == 30
    assert points[4].config.settings == {"max_batch_size": 8, "token_budget": 512, "alpha_s": 1}


def test_series_can_be_cut_and_left_out():
    experiment = tiny(panels=[{"name": "a"}, {"name": "b"}])
    experiment["series"][0] |= {"up_to": 1}
    experiment["series"][1] |= {"not_in": ["b"]}
    points = {(point.panel, point.series, point.x) for point in points_of(parsed(experiment))}
    assert points == {("a", "vllm", 1), ("a", "fastserve", 1), ("a", "fastserve", 2), ("b", "vllm", 1)}
    experiment["series"][0] |= {"up_to": {"a": 1}}
    points = {(point.panel, point.series, point.x) for point in points_of(parsed(experiment))}
    assert ("a", "vllm", 2) not in points
    assert ("b", "vllm", 2) in points


def test_the_same_run_is_carried_out_once_for_all_experiments():
    contents = linked({"one": tiny(), "two": {"same_points_as": "one", "metric": "p95_jct_s", "slo": 9}})
    one, two = (parsed(content) for content in contents.values())
    assert two.metric == "p95_jct_s"
    batches = batches_of(map(points_of, (one, two, parsed(tiny(seeds=[1, 2])))))
    runs = [run for batch in batches.values() for run in batch.runs]
    assert len(runs) == len(set(runs)) == 2 * 2 * 3
    assert set(runs) >= {point.run for point in points_of(two)}


def test_no_run_of_the_shipped_experiments_is_carried_out_twice():
    experiments = shipped()
    runs = [run for batch in batches_of(map(points_of, experiments.values())).values() for run in batch.runs]
    assert len(runs) == len(set(runs))
    assert set(runs) == {point.run for experiment in experiments.values() for point in points_of(experiment)}
    points = sum(len(list(points_of(experiment))) for experiment in experiments.values())
    assert len(runs) < points  # figures 12, 13 and others share those of figure 11


def test_another_series_or_seed_changes_no_batch():
    before = batches_of([points_of(parsed(tiny()))])
    experiment = tiny(seeds=[0, 1, 2])
    experiment["series"].append({"name": "srpt", "label": "SRPT", "policy": "srpt"})
    assert before.items() <= batches_of([points_of(parsed(experiment))]).items()


def test_everything_that_determines_a_run_is_in_its_name():
    names = {point.run for point in points_of(parsed(tiny()))}
    assert len(names) == 8
    (config, *_) = [point.config for point in points_of(parsed(tiny()))]
    assert run_name(config).startswith("vllm-")


def test_what_is_not_said_is_not_in_a_name():
    """Or every field that RunConfig gets would rename all runs, and a pipeline repeat them."""
    assert run_name(RunConfig(policy="vllm", rate=2.0)) == "vllm-93b3f2f931b4"
    assert run_name(RunConfig(policy="vllm", rate=2.0, dtype="float32")) == "vllm-93b3f2f931b4"
    assert run_name(RunConfig(policy="vllm", rate=2.0, dtype="float16")) != "vllm-93b3f2f931b4"


def test_a_history_is_part_of_a_run_and_of_its_name():
    experiment = tiny()
    experiment["series"][1]["run"] |= {"history": "alpaca", "history_requests": 9}
    plain, taught = (list(points_of(parse_as(Experiment, each, "")))[-1] for each in (tiny(), experiment))
    assert (taught.config.history, taught.config.history_requests) == ("alpaca", 9)
    assert plain.run != taught.run


@pytest.mark.parametrize(
    "metric",
    ["mean_normalized_latency_settled_s", "p95_normalized_latency_settled_s", "mean_jct_settled_s",
     "p99_slowdown_settled", "max_slowdown_settled", "settled_requests"],
)  # fmt: skip
def test_metrics_of_settled_requests_can_be_shown(metric):
    assert parsed(tiny(metric=metric)).metric == metric
    assert is_in_schema(tiny(metric=metric))


def test_panels_and_series_take_what_they_do_not_say_from_their_namesakes():
    source = tiny(panels=[{"name": "a", "run": {"rate": 3}, "paper": {"figure": "fig11"}}, {"name": "b"}])
    experiments = linked(
        {
            "source": source,
            "other": {
                "same_points_as": "source",
                "panels": [{"name": "a", "paper": None}],
                "series": [{"name": "fastserve"}],
            },
        }
    )
    other = experiments["other"]
    assert other["panels"] == [{"name": "a", "run": {"rate": 3}, "paper": None}]
    assert other["series"] == [source["series"][1]]
    with pytest.raises(ConfigError, match="'nobody'"):
        linked({"x": {"same_points_as": "nobody"}})


def test_an_experiment_takes_its_points_from_one_that_takes_them_from_another():
    chain = {"a": tiny(slo=0.2), "b": {"same_points_as": "a", "slo": 0.4}, "c": {"same_points_as": "b", "title": "C"}}
    last = linked(chain)["c"]
    assert (last["slo"], last["title"], last["series"]) == (0.4, "C", chain["a"]["series"])
    for circle in ({"a": {"same_points_as": "a"}}, {"a": {"same_points_as": "b"}, "b": {"same_points_as": "a"}}):
        with pytest.raises(ConfigError, match="which takes its points from"):
            linked(circle)


def test_targets_and_ratios_are_valid_and_optional():
    assert parsed(tiny()).targets == parsed(tiny(targets=[])).targets == ()
    targets = [TARGET, TARGET | {"at": [2, "1"], "at_most": 1}]
    assert len(parsed(tiny(figure="ratios", over="vllm", targets=targets)).targets) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda e: e.update(targets=[TARGET | {"statistic": "mean"}]),
            "targets 'Faster': statistic must be one of 'geometric_mean' or 'largest', not 'mean'",
        ),
        (
            lambda e: e.update(targets=[TARGET | {"metric": ""}]),
            "targets 'Faster': metric must be a metric of points.csv, such as mean_jct_s or "
            "p95_normalized_latency_s, not ''",
        ),
        (lambda e: e.update(targets=[TARGET | {"at_most": 0}]), "at_most must be a number above 0, not 0"),
        (lambda e: e.update(targets=[TARGET | {"at": []}]), "at must not be empty, not []"),
        (lambda e: e.update(targets=[{"claim": "C"}]), "targets 'C': metric is missing (and 4 more)"),
        (lambda e: e.update(targets=[TARGET, TARGET | {"claim": 3}]), "targets 3: claim must be a text"),
        (lambda e: e.update(over=1), "over must be a name of small letters and digits"),
        (lambda e: e.update(sedes=[0]), "unknown key 'sedes'; did you mean 'seeds'?"),
        (lambda e: e["series"][0].update(polisy="vllm"), "series 'vllm': unknown key 'polisy'; did you mean 'policy'?"),
        (
            lambda e: e["points"][0].update(requests=3),
            "points 1: unknown key 'requests'; did you mean 'num_requests'?",
        ),
        (lambda e: e["run"].update(modle="opt"), "run: unknown key 'modle'; did you mean 'model'?"),
        (
            lambda e: e["run"].update(zzz=1),
            "run: unknown key 'zzz'; valid keys: profile, profile_suffix, profile_prefix",
        ),
        (
            lambda e: e.update(backend="simulation"),
            "backend must be one of 'sim', 'engine', 'both' or 'http', not 'sim",
        ),
        (lambda e: e.update(figure="pie"), "figure must be one of 'load', 'slo', "),
        (lambda e: e.update(seeds=[0, 0]), "seeds must differ, 0 is there twice"),
        (lambda e: e.update(seeds=[]), "seeds must not be empty"),
        (lambda e: e.update(seeds=[-1]), "seeds 1 must be at least 0, not -1"),
        (lambda e: e.update(seeds=3), "seeds must be a list, not 3"),
        (lambda e: e.update(slo=0), "slo must be a number above 0, not 0"),
        (lambda e: e.update(slo="0.3"), "slo must be a number above 0, not '0.3'"),
        (lambda e: e.update(metric="mean_latency"), "metric must be a metric of points.csv"),
        (
            lambda e: e.update(least_processor_share=95),
            "least_processor_share must be a number from 0 to 1, not 95",
        ),
        (lambda e: e["points"][0].update(rate="fast"), "points 1: rate must be a number above 0, not 'fast'"),
        (
            lambda e: e["points"][0].update(num_requests=1.5),
            "num_requests must be a whole number of at least 1, not 1.5",
        ),
        (lambda e: e["points"][0].update(num_requests=None), "num_requests must be a whole number of at least 1"),
        (lambda e: e["run"].update(history_requests=-1), "run.history_requests must be a whole number of at least 1"),
        (
            lambda e: e["run"].update(settings={"alpha_s": [1]}),
            "run.settings.alpha_s must be a number, a text, true or",
        ),
        (lambda e: e["series"][0].update(name="Up/down"), "series 'Up/down': name must be a name of small letters"),
        (lambda e: e["series"][0].update(variant="yes"), "series 'vllm': variant must be true or false, not 'yes'"),
        (lambda e: e["series"][0].update(up_to="much"), "up_to must be a number, or numbers by panel, not 'much'"),
        (lambda e: e.pop("series"), "series is missing"),
        (lambda e: e.update(series="all"), "series must be a list, not 'all'"),
        (lambda e: e.update(points=None), "points must be a list, not None"),
        (lambda e: e.update(run=[]), "run must hold keys with values, not []"),
    ],
)
def test_typos_and_wrong_types_are_refused(change, message):
    content = tiny()
    change(content)
    with pytest.raises(ConfigError) as refused:
        parsed(content)
    (line,) = str(refused.value).splitlines()
    assert line.startswith("tiny.yaml: ")
    assert message in line
    assert not is_in_schema(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["series"][1].update(policy="fastsrve"), "series 'fastserve': unknown policy 'fastsrve'"),
        (lambda e: e["series"][1].update(run={"settings": {"alfa_s": 1}}), "unknown option 'alfa_s'"),
        (lambda e: e["series"][1].update(run={"settings": {"alpha_s": "soon"}}), "alpha_s"),
        (lambda e: e["series"][1].update(run={"profile": "a100-80g/opt-13"}), "a100-80g/opt-13"),
        (lambda e: e["series"][1].update(run={"trace": "sharegtp"}), "unknown trace 'sharegtp'"),
        (lambda e: e["series"][1].update(name="vllm"), "series must differ, 'vllm' is there twice"),
        (lambda e: e["series"][1].update(label="vLLM"), "labels must differ, 'vLLM' is there twice"),
        (lambda e: e["points"].append({"rate": 2}), "must differ, 2 is there twice"),
        (lambda e: e.pop("points"), "there are no points; give `points`"),
        (lambda e: e["series"][1].update(run={"history": "alpaca"}), "needs --history-requests"),
        (
            lambda e: e["series"][1].update(run={"history": "alpaca", "history_requests": 9}),
            "policy 'fastserve' learns nothing from finished requests",
        ),
        (lambda e: e["run"].pop("profile"), "a simulation needs a profile"),
        (lambda e: e.update(figure="ratios"), "need a series over which to show others, not None: vllm, fastserve"),
        (lambda e: e.update(figure="ratios", over="srpt"), "not 'srpt': vllm, fastserve"),
        (lambda e: e.update(targets=[TARGET | {"of": "srpt"}]), "'srpt' is none of the series; there are: vllm"),
        (lambda e: e.update(targets=[TARGET | {"over": "fastserve"}]), "of and over are both 'fastserve'"),
        (lambda e: e.update(targets=[TARGET | {"panels": ["b"]}]), "target 'Faster': 'b' is none of the panels"),
        (lambda e: e.update(targets=[TARGET | {"at": [1, 3]}]), "share no point at 3; they do at: 1, 2"),
        (lambda e: (e["series"][0].update(up_to=0), e.update(targets=[TARGET])), "share no point; see up_to"),
        (lambda e: e.update(backend="both", targets=[TARGET]), "targets need backend sim or engine, not 'both'"),
    ],
)
def test_what_no_key_shows_by_itself_is_refused_before_any_work(change, message):
    content = tiny()
    change(content)
    with pytest.raises(ConfigError, match=r"^tiny\.yaml: ") as refused:
        parsed(content)
    assert message in str(refused.value)


@pytest.mark.parametrize("content", [{"panels": 3}, {"series": [3]}, {"series": [{"name": []}]}, {"panels": None}])
def test_a_link_between_experiments_that_hold_anything_is_refused_in_words(tmp_path, content):
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(tiny()), encoding="utf-8")
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"same_points_as": "one"} | content), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"two\.yaml: {next(iter(content))}"):
        read_experiments(tmp_path)


def test_the_configuration_is_read_from_texts_too():
    read = read_configuration({"claims": "null", "seeds": ["0", "1"], "vllm": "cpu"})
    assert (read.claims, read.seeds, read.vllm) == (None, (0, 1), "cpu")
    assert read_configuration(read_yaml(CONFIG / "default.yaml")) == read_configuration({})
    with pytest.raises(ConfigError, match="configuration: vllm must be one of 'auto', 'cpu' or 'cuda', not 'gpu'"):
        read_configuration({"vllm": "gpu"})


def test_rates_of_figure_11_are_the_papers():
    reported = pd.read_csv(WORKFLOWS / "data" / "reported_points.csv", keep_default_na=False)
    assert len(reported) == 585
    panel = shipped()["fig11"].panels[0]
    of_fastserve = reported[
        (reported.figure == "fig11") & (reported.dataset == "sharegpt") & (reported.model == "opt-13b")
    ]
    rates = {point.rate for point in panel.points}
    papers = set(of_fastserve.request_rate_per_s)
    # 8 is ours, to find a crossing between 6 and 10; beyond the paper's highest, ours go on to where curves cross.
    assert {rate for rate in rates if rate <= max(papers)} - {8} <= papers


def test_an_edited_policy_gives_its_runs_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (ROOT / "docs/add-a-policy.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n# two_classes\.py\n(.*?)```", source, re.DOTALL)
    path = tmp_path / "two_classes.py"
    path.write_text(code.replace("@register\n", ""))
    monkeypatch.chdir(tmp_path)
    points._source.cache_clear()
    config = RunConfig(policy="two_classes.py:TwoClasses", profile="a100-80g/opt-13b-tp1", rate=2.0)
    before = run_name(config)
    assert before.startswith("two_classes.TwoClasses-")
    path.write_text(code.replace("@register\n", "") + "# edited\n")
    points._source.cache_clear()  # As another job of the pipeline, in a process of its own.
    assert run_name(config) != before


def test_the_source_of_our_policies_is_no_part_of_a_run() -> None:
    """So a run's name rests on its configuration alone. This one is of the experiments as they were."""
    assert run_name(RunConfig(profile="a100-80g/opt-13b-tp1", rate=2.0)) == "fastserve-cdc7d92b4376"


def test_points_of_the_rerun_are_chosen_beside_the_papers():
    panel = {"name": "a", "run": {"rate": 3}, "slo": 0.2}
    panel |= {
        "paper": {"figure": "fig14", "model": "opt-13b bs=64"},
        "rerun": {"figure": "fig14", "model": "opt-13b bs=64"},
    }
    experiment = parse_as(Experiment, tiny(panels=[panel]), "tiny")
    table = load_reported(*PLOTTED, experiment)
    assert set(table["source"]) == {"paper", "rerun"}
    rerun = table[(table["source"] == "rerun") & (table["system"] == "FastServe-FCFS")]
    assert dict(zip(rerun["rate"], rerun["value"], strict=True)) == {1: 0.0417, 2.5: 0.0529, 2.75: 0.0847, 3: 0.2285}
    without = parse_as(Experiment, tiny(panels=[{"name": "a", "run": {"rate": 3}}]), "tiny")
    assert load_reported(*PLOTTED, without).empty
    wrong = panel | {"rerun": {"figure": "fig12"}}
    with pytest.raises(
        ConfigError, match=r"artifact_rerun_points.csv holds no points with figure 'fig12'; there are: fig11"
    ):
        load_reported(*PLOTTED, parse_as(Experiment, tiny(panels=[wrong]), "tiny"))


def test_a_curve_of_the_rerun_that_leaves_its_plot_is_marked():
    table = pd.read_csv(PLOTTED[1], keep_default_na=False)
    assert len(table) == 223
    top = table.groupby("figure")["value"].transform("max")
    at_top = table[(table["value"] == top) & (table["figure"] != "fig18")]
    assert set(at_top["at_frame"]) == {"yes"}
    assert not set(table["at_frame"]) - {"yes", "no"}
    rates = table.loc[table["at_frame"] == "no", "request_rate_per_s"]
    assert (rates.round(2) == rates).all()  # Those measured are round numbers.


def test_a_panel_has_its_own_bound_or_the_experiments():
    panels = [{"name": "a", "run": {"rate": 3}, "slo": 0.2}, {"name": "b", "run": {"rate": 3}}]
    experiment = parse_as(Experiment, tiny(panels=panels, slo=0.3), "tiny")
    assert [experiment.slo_of(panel.name) for panel in experiment.panels] == [0.2, 0.3]
    rows = [
        {"panel": panel, "series": series.name, "x": x, "seed": 0, experiment.metric: y}
        for panel in "ab"
        for series in experiment.series
        for x, y in ((1, 0.1), (2, 0.3), (3, 0.5))
    ]
    plotted = pd.DataFrame(
        [("a", "rerun", "S", 1, 0.0), ("a", "rerun", "S", 2, 0.4)],
        columns=["panel", "source", "system", "rate", "value"],
    )
    shown = experiment.model_copy(
        update={"series": tuple(each.model_copy(update={"paper_system": "S"}) for each in experiment.series)}
    )
    table = capacity_table("tiny", shown, pd.DataFrame(rows), plotted).drop_duplicates("panel").set_index("panel")
    assert table["slo"].to_dict() == {"a": 0.2, "b": 0.3}
    assert table["capacity"].to_dict() == pytest.approx({"a": 1.5, "b": 2.0})
    assert table.loc["a", "rerun_capacity"] == pytest.approx(1.5)
    assert table.loc["a", "rerun_difference"] == pytest.approx(0)
    assert np.isnan(table.loc["b", "rerun_capacity"])

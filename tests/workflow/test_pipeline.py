import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from harness.experiments.batches import batches_of
from harness.experiments.folder import read_experiments
from harness.experiments.points import points_of
from harness.pipeline.batch import read_batches
from support.loaded_code import scripts_watched, watch_scripts

pytest.importorskip("snakemake")

ROOT = Path(__file__).resolve().parents[2]
SERIES = {"vllm": "a100-80g/opt-13b-tp1-vllm", "fastserve": "a100-80g/opt-13b-tp1-swifttransformer"}


def write_experiment(folder, **changes):
    experiment = {
        "title": "Tiny",
        "figure": "load",
        "backend": "sim",
        "seeds": [0, 1],
        "slo": 0.3,
        "run": {"trace": "sharegpt", "arrivals": "poisson"},
        "points": [{"rate": 2, "num_requests": 20}],
        "series": [{"name": n, "label": n, "policy": n, "run": {"profile": p}} for n, p in SERIES.items()],
    }
    (folder / "experiments").mkdir(exist_ok=True)
    (folder / "experiments/tiny.yaml").write_text(yaml.safe_dump(experiment | changes), encoding="utf-8")
    (folder / "experiments/other.yaml").write_text(
        yaml.safe_dump({"same_points_as": "tiny", "metric": "p95_jct_s", "slo": 5}), encoding="utf-8"
    )


def write_claims(folder, **changes):
    measure = {"kind": "ratio", "experiment": "tiny", "of": "fastserve", "over": "vllm", "x": 2} | changes
    claim = {"id": "c", "group": "paper", "claim": "C", "source": "S", "paper": 1.3, "measure": measure}
    (folder / "claims.yaml").write_text(yaml.safe_dump({"claims": [claim]}), encoding="utf-8")


def snakemake(folder, *arguments, **environment):
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "-d", folder, "-c", "2", "--nocolor"]
    profile = ["--workflow-profile", ROOT / "workflows/profiles/default"]
    return subprocess.run(
        [*command, *profile, *arguments, "--config", "experiments=experiments", "claims=claims.yaml"],
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")} | environment,
    )


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_a_command_repeats_a_run(runs, requests, out):
    name, result = next(iter(runs.items()))
    command = shlex.split(result["command"])
    assert command[:2] == ["fastbench", "run"]
    subprocess.run([sys.executable, "-m", "harness.cli", *command[1:], "--out", out], check=True, capture_output=True)
    own = requests[requests["run"] == name].drop(columns="run").reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_parquet(out / "requests.parquet"), own)
    summary, meta = (json.loads((out / f"{kind}.json").read_text(encoding="utf-8")) for kind in ("summary", "meta"))
    assert summary.items() <= result["metrics"].items()
    assert meta | {"created_at": None} == result["meta"] | {"created_at": None}


def test_from_experiments_to_figures_verdicts_and_report(tmp_path):
    target = {"claim": "T", "metric": "mean_jct_s", "of": "fastserve", "over": "vllm"}
    write_experiment(tmp_path, targets=[target | {"statistic": "largest", "at_most": 100}])
    write_claims(tmp_path)
    first = snakemake(tmp_path, PYTHONPATH=watch_scripts(tmp_path / "loaded"))
    assert first.returncode == 0, first.stderr
    steps = {"collect", "capacity", "targets", "against_itself", "claims", "draw", "draw_headline"}
    assert scripts_watched(tmp_path / "loaded") == steps
    assert "Execute" not in first.stderr  # one line of progress alone

    results = tmp_path / "results"
    assert files_in(tmp_path / "figures") == sorted(
        f"{name}.{kind}" for name in ("tiny", "other", "headline") for kind in ("pdf", "png")
    )
    batches = sorted((results / "batches").glob("*.json"))
    runs = read_batches(batches)
    assert (len(batches), len(runs)) == (4, 4)  # two series, two seeds; the second experiment shares them
    requests = pd.concat(map(pd.read_parquet, (results / "batches").glob("*.requests.parquet")))
    assert requests.groupby("run", observed=True).size().to_dict() == dict.fromkeys(runs, 20)
    assert_a_command_repeats_a_run(runs, requests, tmp_path / "alone")
    tables = {name: pd.read_csv(results / name / "points.csv") for name in ("tiny", "other")}
    assert tables["tiny"]["run"].tolist() == tables["other"]["run"].tolist()
    table = tables["tiny"]
    assert {"panel", "x", "finished", "mean_normalized_latency_s", "max_slowdown", "slo_attainment_1"} <= set(table)
    assert table["series"].tolist() == [name for name in SERIES for _ in range(2)]
    assert (table["finished"] == 20).all()
    assert set(pd.read_csv(results / "other/capacity.csv")["metric"]) == {"p95_jct_s"}
    (verdict,) = pd.read_csv(results / "headline/claims.csv").to_dict("records")
    by_series = table.groupby("series")["mean_normalized_latency_s"].mean()
    assert verdict["value"] == pytest.approx(by_series["vllm"] / by_series["fastserve"])

    (row,) = pd.read_csv(results / "tiny/targets.csv").to_dict("records")
    times = table.groupby("series")["mean_jct_s"].mean()
    assert (row["value"], row["met"]) == (pytest.approx(times["fastserve"] / times["vllm"]), "yes")

    again = snakemake(tmp_path)
    assert again.returncode == 0
    assert "Nothing to be done" in again.stderr

    before = {path: path.read_bytes() for path in results.rglob("*.csv")}
    repeated = snakemake(tmp_path, "--forceall", "--until", "claims", "capacity", "targets")
    assert repeated.returncode == 0, repeated.stderr
    assert {path: path.read_bytes() for path in results.rglob("*.csv")} == before

    page = tmp_path / "report.html"
    made = snakemake(tmp_path, "--report", str(page))
    assert made.returncode == 0, made.stderr
    text = page.read_text(encoding="utf-8")
    assert "Verdicts" in text
    assert f"<em>{verdict['verdict']}</em>" in text or verdict["verdict"] in text
    assert '<script src="http' not in text
    assert '<link rel="stylesheet" href="http' not in text


def test_bad_input_is_told_before_any_work(tmp_path):
    write_experiment(tmp_path, sedes=[0])
    write_claims(tmp_path)
    refused = snakemake(tmp_path)
    assert refused.returncode != 0
    assert "experiments/tiny.yaml: unknown key 'sedes'; did you mean 'seeds'?" in refused.stderr
    assert not (tmp_path / "results").exists()

    write_experiment(tmp_path)
    write_claims(tmp_path, of="fsatserve")
    refused = snakemake(tmp_path)
    assert refused.returncode != 0
    assert "'fsatserve'" in refused.stderr
    assert not (tmp_path / "results").exists()


def test_a_run_of_which_nothing_finishes_fails_its_job_instead_of_drawing_an_empty_figure(tmp_path):
    write_experiment(tmp_path, run={"trace": "fixed:prompt=100000,output=10"})
    write_claims(tmp_path)
    failed = snakemake(tmp_path)
    assert failed.returncode != 0
    run = "a100-80g/opt-13b-tp1-vllm, fixed:prompt=100000,output=10, 20 requests at 2/s, seed 0"
    assert f"error: vllm, {run}: none of 20 requests finished" in failed.stderr
    assert "to repeat this run alone: fastbench run --policy vllm" in failed.stderr
    assert "none of 20 requests finished; request 0: prompt of 100000 tokens" in failed.stderr
    assert not (tmp_path / "figures").exists()
    assert not list(tmp_path.glob("results/*/points.csv"))


def test_a_job_that_fails_halfway_says_why_and_leaves_no_table(tmp_path):
    trace = f"csv:{ROOT / 'traces' / 'fixtures' / 'lengths.csv'}"  # Four requests: enough for the first rate alone.
    points = [{"rate": 1, "num_requests": 3}, {"rate": 2, "num_requests": 30}]
    write_experiment(tmp_path, run={"trace": trace, "arrivals": "trace"}, points=points)
    write_claims(tmp_path)
    failed = snakemake(tmp_path, "results/tiny/points.csv")
    assert failed.returncode != 0
    assert "error: " in failed.stderr
    assert "fewer than the 30" in failed.stderr
    assert "Traceback" not in failed.stderr
    results = tmp_path / "results"
    assert not list(results.rglob("*.csv"))
    assert not list((results / "batches").glob("*"))
    # The first rate of each batch was carried out all the same.
    assert any("took" in log.read_text(encoding="utf-8") for log in (results / "logs").iterdir())
    assert any("fewer than the 30" in log.read_text(encoding="utf-8") for log in (results / "logs").iterdir())


def dry_run(folder, *config):
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "-d", folder, "-c", "2", "--nocolor", "-n"]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(
        [*command, "--config", *config], capture_output=True, text=True, timeout=180, check=False, env=environment
    )


@pytest.mark.parametrize("where", ["experiments", "experiments/tiny.yaml"])
def test_the_configuration_is_taken_from_the_command_line(tmp_path, where):
    write_experiment(tmp_path, seeds=[5])
    done = dry_run(tmp_path, f"experiments={where}", "claims=null", "seeds=[0,1]", "vllm=cpu")
    assert done.returncode == 0, done.stderr
    assert "rule claims" not in done.stdout
    expected = batches_of([points_of(read_experiments(tmp_path / "experiments", seeds=[0, 1])["tiny"])])
    assert expected
    assert all(f"results/batches/{name}.json" in done.stdout for name in expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty.yaml must hold keys with values, as in workflows/config; it holds None"),
        (b"- 3", "empty.yaml must hold keys with values, as in workflows/config; it holds [3]"),
        (b"a: [", "empty.yaml: while parsing a flow node"),
        (b"\xff\xfe\x00", "cannot read "),
        (b"title: x", "experiments/empty.yaml: figure is missing"),
    ],
)
def test_an_experiment_that_cannot_be_read_is_named(tmp_path, content, message):
    write_experiment(tmp_path)
    (tmp_path / "experiments/empty.yaml").write_bytes(content)
    done = dry_run(tmp_path, "experiments=experiments", "claims=null")
    assert done.returncode == 1
    assert message in done.stderr + done.stdout
    assert "AttributeError" not in done.stderr


def test_claims_about_other_experiments_say_how_to_go_without(tmp_path):
    write_experiment(tmp_path)
    done = dry_run(tmp_path, "experiments=experiments")
    assert done.returncode == 1
    assert "no experiment 'fig11'; there are: other, tiny; --config claims=null leaves the claims out" in done.stdout


def test_a_quick_look_says_so_in_every_figure_and_caption(tmp_path):
    write_experiment(tmp_path, seeds=[0, 1, 2])
    (tmp_path / "experiments/tiny.yaml").rename(tmp_path / "experiments/fig99.yaml")
    (tmp_path / "experiments/other.yaml").unlink()
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "-d", tmp_path, "-c", "2", "--nocolor"]
    profile = ["--workflow-profile", ROOT / "workflows/profiles/default"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    for extra in ([], ["--report", "report.html"]):
        subprocess.run(
            [*command, *profile, *extra, "--config", "experiments=experiments", "quick=true"],
            check=True,
            capture_output=True,
            env=environment,
        )
    assert pd.read_csv(tmp_path / "results/fig99/points.csv")["seed"].nunique() == 2
    assert not (tmp_path / "results/headline").exists()
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "QUICK LOOK: the figures of the paper with two seeds" in text
    assert "QUICK LOOK, 2 of 3 seeds: Tiny" in text
    assert "QUICK LOOK with 2 of 3 seeds, not the full result" in text

"""The session for a machine with a GPU, and what reads its records, tried out on the CPU."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pandas as pd
import pytest
import torch

from fastserve.core.config import CacheConfig
from fastserve.core.errors import ConfigError
from harness.analysis.files import provenance
from harness.report.captions import recorded_caption
from harness.report.plots import RECORDED_VIEWS, draw_recorded, recorded_of
from harness.studies import agreement
from harness.studies.agreement import compare, recorded_folders
from harness.studies.recorded import plan as plan_module
from harness.studies.recorded.design import Design
from harness.studies.recorded.plan import make_plan, read_plan
from harness.studies.recorded.recording import MORE_TO_DO, record

ROOT = Path(__file__).resolve().parents[2]
POLICIES = ("fastserve", "fastserve-fcfs", "vllm")
SMALL = ("--max-batch-sizes", "2", "--memories", "all")


def session(*arguments):
    parts = os.pathsep.join(str(ROOT / part) for part in ("system", "workflows", ""))
    return subprocess.run(
        [sys.executable, ROOT / "tools/gpu_session.py", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": parts, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """A session with all that is recorded, and its archive."""
    folder = tmp_path_factory.mktemp("session")
    out, archive = folder / "tiny", folder / "tiny.tar.gz"
    chosen = ("--steps", "profile", "recorded", "simulations")
    done = session("--dry-run", *chosen, "--max-batch-sizes", 3, "--out", out, "--pack", archive, "--commit", "c0ffee")
    assert done.returncode == 0, done.stdout + done.stderr
    return done, out, archive


def test_a_dry_run_records_every_run_and_compares_it(dry_run):
    done, out, _ = dry_run
    plan = read_plan(out)
    assert len(plan.runs) == 2 * 3  # memories, policies
    assert [each.config.policy for each in plan.runs] == [*POLICIES] * 2
    table = pd.read_csv(out / "points.csv")
    assert len(table) == len(plan.runs)
    for each in plan.runs:
        summary = json.loads((each.folder(out) / "summary.json").read_text())
        assert (summary["backend"], summary["finished"]) == ("engine", each.config.num_requests)
        meta = json.loads((each.folder(out) / "meta.json").read_text())
        assert meta["commit"] == "c0ffee"
        assert meta["configuration"]["engine"]["num_gpu_blocks"] == each.config.settings["num_gpu_blocks"]
        assert meta["recorded"]["pools"]["num_host_blocks"] == plan.cache.num_host_blocks
        (row,) = table[(table["real_run"] == str(each.folder(out)))].to_dict("records")
        assert row["real_mean_normalized_latency_s"] == summary["mean_normalized_latency_s"]
        assert row["rate"] == each.config.rate
    limited = [each for each in plan.runs if each.memory == "tokens:512"]
    assert {each.config.settings["num_gpu_blocks"] for each in limited} == {32}
    shown = done.stdout.splitlines()
    assert shown[-1].startswith("packed")
    assert any(line.startswith("recorded ") and "done" in line for line in shown[-6:])


def test_a_call_is_noted_with_what_it_ran_on(dry_run):
    _, out, _ = dry_run
    (call,) = json.loads((out / "meta.json").read_text())["calls"]
    assert call["commit"] == "c0ffee"
    assert call["versions"]["torch"] == torch.__version__
    assert call["hardware"]["cores"] == os.cpu_count()
    assert call["options"]["model"] == "opt-tiny"
    assert list(call["steps"]) == ["profile", "recorded", "simulations"]
    assert all(step["outcome"].startswith("done") for step in call["steps"].values())


def test_the_archive_holds_the_whole_folder(dry_run):
    _, out, archive = dry_run
    with tarfile.open(archive) as tar:
        packed = {name for name in tar.getnames() if tar.getmember(name).isfile()}
    assert packed == {f"tiny/{path.relative_to(out)}" for path in out.rglob("*") if path.is_file()}


def test_a_session_stops_at_a_failure_and_goes_on_from_there(dry_run, tmp_path):
    out = tmp_path / "out"
    (out / "logs").mkdir(parents=True)
    for made in ("profile.json", "logs/profile.log"):
        shutil.copy(dry_run[1] / made, out / made)
    arguments = ("--dry-run", "--steps", "profile", "recorded", "--out", out, *SMALL)
    failed = session(*arguments, "--policies", "fastserve", "sooner", "--pack", tmp_path / "out.tar.gz")
    assert failed.returncode == 1
    assert "profile: done before" in failed.stdout
    assert "recorded: failed" in failed.stdout
    assert "'sooner'" in (out / "logs/recorded.unfinished.log").read_text(encoding="utf-8")
    assert not (out / "logs/recorded.log").exists()
    with tarfile.open(tmp_path / "out.tar.gz") as tar:
        assert "out/logs/recorded.unfinished.log" in tar.getnames()

    again = session(*arguments, "--policies", "fastserve")
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(list((out / "runs").iterdir())) == 1
    calls = json.loads((out / "meta.json").read_text())["calls"]
    assert [call["steps"]["recorded"]["outcome"].split(",")[0] for call in calls] == ["failed", "done"]


def test_a_step_that_takes_too_long_is_killed_with_all_it_started(tmp_path):
    killed = session("--dry-run", "--steps", "prof*", "recorded", "--limit", "profile=0.5", "--out", tmp_path)
    assert killed.returncode == 1
    assert re.search(r"profile: failed, \d s: took longer than 0\.5 s and was killed", killed.stdout)
    assert not (tmp_path / "profile.json").exists()
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["profile.unfinished.log"]
    assert (tmp_path / "logs/profile.unfinished.log").read_text().endswith("killed after 0.5 s\n")


def test_what_does_not_fit_into_the_minutes_is_left_for_the_next_call(tmp_path):
    left = session("--dry-run", "--steps", "profile", "recorded", "simulations", "--minutes", "1", "--out", tmp_path)
    assert left.returncode == MORE_TO_DO
    for step in ("profile", "recorded", "simulations"):
        assert f"{step}: left" in left.stdout
    assert not any((tmp_path / "runs").iterdir())


def test_steps_are_listed_and_an_unknown_one_is_named():
    listed = session("--list", "--dry-run")
    assert listed.returncode == 0
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    benchmarks = [f"benchmark-{path.stem[4:]}" for path in sorted((ROOT / "benchmarks").glob("gpu_*.py"))]
    assert [name for name in names if name.startswith("benchmark-")] == benchmarks
    assert names[-3:] == ["profile", "recorded", "simulations"]
    refused = session("--list", "--dry-run", "--steps", "profil")
    assert refused.returncode == 2
    assert "there is no step 'profil'; there are: " in refused.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_what_to_do(tmp_path):
    refused = session("--out", tmp_path)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert "sees no GPU" in refused.stderr
    assert "--dry-run" in refused.stderr
    assert list(tmp_path.iterdir()) == []


# -- recording -------------------------------------------------------------------------------------------------------


def design_of(out):
    return read_plan(out).design


def test_recording_stops_before_a_run_that_would_not_end_in_time(dry_run, tmp_path, capsys):
    _, out, _ = dry_run
    shutil.copytree(out, tmp_path / "copy")
    first = read_plan(tmp_path / "copy").runs[0]
    shutil.rmtree(first.folder(tmp_path / "copy"))
    assert record(design_of(out), tmp_path / "copy", minutes=0.01) is False
    assert not first.is_there(tmp_path / "copy")
    assert first.name in capsys.readouterr().out
    assert record(design_of(out), tmp_path / "copy") is True
    assert first.is_there(tmp_path / "copy")
    assert "5 of 6 runs are recorded" in capsys.readouterr().out


def test_recording_goes_on_only_with_the_same_design_and_profile(dry_run, tmp_path):
    _, out, _ = dry_run
    shutil.copytree(out, tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"recorded with seconds 0\.3, not 6\.0"):
        record(Design(**{**vars(design_of(out)), "seconds": 6.0}), tmp_path / "copy")
    profile = tmp_path / "copy/profile.json"
    profile.write_text(profile.read_text() + "\n")
    with pytest.raises(ConfigError, match="not the profile that the plan rests on"):
        record(design_of(out), tmp_path / "copy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loads": ()}, "loads: give at least one"),
        ({"policies": ("vllm", "vllm")}, "policies: give at least one, each once"),
        ({"seconds": 0.0}, "seconds must be a finite number above 0"),
        ({"max_batch_sizes": (0,)}, "max_batch_sizes must be an integer of at least 1"),
        ({"host_gib": -1.0}, "host_gib must be"),
    ],
)
def test_a_design_says_what_is_wrong_with_it(change, message):
    with pytest.raises(ConfigError, match=message):
        Design(**change)


def test_the_cache_of_a_smaller_gpu_is_that_of_its_profile(dry_run, monkeypatch):
    _, out, _ = dry_run
    monkeypatch.setattr(plan_module, "_pools", lambda *_: CacheConfig(6000, 4000, 16, 819_200))
    design = Design(device="cpu", traces=("alpaca",), max_batch_sizes=(4,), loads=(0.5, 2.0), policies=("vllm",))
    plan = make_plan(design, out / "profile.json")
    assert [(each.memory, each.config.settings["num_gpu_blocks"]) for each in plan.runs] == [
        ("a100-40g", 911), ("a100-40g", 911), ("all", 6000), ("all", 6000)
    ]  # fmt: skip
    for slow, fast in (plan.runs[:2], plan.runs[2:]):
        assert fast.config.rate == pytest.approx(4 * slow.config.rate, rel=0.01)
        assert fast.config.num_requests == pytest.approx(design.seconds * fast.config.rate, abs=1)
        assert slow.config.num_requests >= design.fewest_requests
    with pytest.raises(ConfigError, match=r"7500 blocks; the pool on cpu has 6000"):
        make_plan(Design(**{**vars(design), "memories": ("tokens:120000",)}), out / "profile.json")
    with pytest.raises(ConfigError, match="no profile 'b200/opt-13b-tp1'"):
        make_plan(Design(**{**vars(design), "memories": ("b200",)}), out / "profile.json")


# -- what reads them -------------------------------------------------------------------------------------------------


def test_the_comparison_is_of_the_same_requests_and_repeats_to_the_byte(dry_run, tmp_path):
    _, out, _ = dry_run
    first, again = compare(out, tmp_path / "a"), compare(out, tmp_path / "b")
    pd.testing.assert_frame_equal(first.drop(columns="sim_run"), again.drop(columns="sim_run"))
    for row in first.to_dict("records"):
        real, sim = (pd.read_parquet(Path(row[f"{kind}_run"]) / "requests.parquet") for kind in ("real", "sim"))
        for column in ("prompt_tokens", "output_tokens"):
            assert real[column].tolist() == sim[column].tolist()
        assert row["real_swap_out_bytes"] == real["swap_out_bytes"].sum()
        assert row["error_p95_jct_s"] == pytest.approx(row["sim_p95_jct_s"] / row["real_p95_jct_s"] - 1)


def test_transfers_are_hidden_but_for_what_was_stalled(dry_run, tmp_path):
    _, out, _ = dry_run
    shutil.copytree(out, tmp_path / "copy")
    first, second, *_ = (each.folder(tmp_path / "copy") for each in read_plan(out).runs)
    transfers = pd.DataFrame(
        {"direction": ["out", "in"], "num_bytes": [8, 8], "start_s": [0.0, 1.0], "end_s": [2.0, 4.0]}
    )
    transfers.to_parquet(first / "transfers.parquet")
    transfers.iloc[:0].to_parquet(second / "transfers.parquet")
    iterations = pd.read_parquet(first / "iterations.parquet").assign(stalled_s=0.0)
    iterations.loc[[1, 3], "stalled_s"] = [0.3, 0.1]
    iterations.to_parquet(first / "iterations.parquet")
    rows = compare(tmp_path / "copy", tmp_path / "sim").head(2)
    assert rows["real_transfer_s"].tolist() == [4.0, 0.0]
    assert rows["real_hidden_share"].tolist() == [pytest.approx(0.9), pytest.approx(float("nan"), nan_ok=True)]
    assert "at least 90.0% of transfer time hidden" in agreement.describe(rows)[0]


def test_requests_that_are_no_longer_the_recorded_ones_are_refused(dry_run, tmp_path):
    _, out, _ = dry_run
    shutil.copytree(out, tmp_path / "copy")
    plan = tmp_path / "copy/plan.json"
    plan.write_text(plan.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ConfigError, match="gives other requests now than when this was recorded"):
        compare(tmp_path / "copy", tmp_path / "sim")
    with pytest.raises(ConfigError, match="cannot read the plan"):
        compare(tmp_path, tmp_path / "sim")


def test_time_with_any_transfer_under_way_is_counted_once():
    transfers = pd.DataFrame({"start_s": [5.0, 0.0, 1.0, 1.5], "end_s": [6.0, 2.0, 3.0, 2.0]})
    assert agreement._time_covered(transfers) == pytest.approx(4.0)
    assert agreement._time_covered(transfers.iloc[:0]) == 0.0


def test_the_figures_show_every_run(dry_run, tmp_path):
    _, out, _ = dry_run
    table = compare(out, tmp_path / "sim")
    caption = recorded_caption(table, provenance(Path(run) for run in table["real_run"]))
    assert "6 runs" in caption
    assert "c0ffee" in caption
    latency = recorded_of("latency", table, "T", caption)
    assert len(latency.axes) == 2
    shown = [line.get_ydata() for axes in latency.axes for line in axes.lines]
    assert sorted(value for line in shown for value in line) == pytest.approx(
        sorted([*table["real_mean_normalized_latency_s"], *table["sim_mean_normalized_latency_s"]])
    )
    errors = recorded_of("agreement", table, "T", caption)
    assert all(sum(len(line.get_ydata()) for line in axes.lines[:3]) == 6 for axes in errors.axes)
    for view in RECORDED_VIEWS:
        for path in draw_recorded(view, table, "T", caption, tmp_path / view):
            assert path.stat().st_size > 10_000
    with pytest.raises(ConfigError, match="known: latency, agreement"):
        recorded_of("other", table, "T")


def test_the_pipeline_reads_what_is_recorded_and_says_so_if_nothing_is(dry_run, tmp_path):
    pytest.importorskip("snakemake")
    _, out, _ = dry_run

    def snakemake():
        command = [
            sys.executable,
            "-m",
            "snakemake",
            "-s",
            ROOT / "Snakefile",
            "-d",
            tmp_path,
            "-c",
            "2",
            "--force-use-threads",
            "recorded",
        ]
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        return subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)

    assert recorded_folders(tmp_path / "results") == []
    nothing = snakemake()
    assert nothing.returncode == 0, nothing.stderr
    assert "nothing is recorded" in nothing.stderr
    shutil.copytree(out, tmp_path / "results/recorded/tiny")
    done = snakemake()
    assert done.returncode == 0, done.stderr
    assert len(pd.read_csv(tmp_path / "results/recorded-tiny/points.csv")) == 6
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        f"recorded-tiny-{view}.{kind}" for view in ("agreement", "latency") for kind in ("pdf", "png")
    ]

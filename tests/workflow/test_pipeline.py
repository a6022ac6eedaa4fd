import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

pytest.importorskip("snakemake")

ROOT = Path(__file__).resolve().parents[2]
SERIES = {"vllm": "a100-80g/opt-13b-tp1-vllm", "fastserve": "a100-80g/opt-13b-tp1"}


def write_config(folder, **changes):
    experiment = {
        "kind": "sim",
        "title": "Tiny",
        "trace": "sharegpt",
        "arrivals": "poisson",
        "seeds": [0],
        "slo": 0.3,
        "points": [{"rate": 2, "num_requests": 20}],
        "series": [{"name": n, "label": n, "policy": n, "profile": profile} for n, profile in SERIES.items()],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"experiments": {"tiny": experiment | changes}}), encoding="utf-8")
    return path


def snakemake(folder, *arguments):
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "-d", folder, "-c", "2"]
    return subprocess.run(
        [*command, "--configfile", folder / "config.yaml", "--nocolor", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")},
    )


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_from_configuration_to_figure(tmp_path):
    write_config(tmp_path)
    first = snakemake(tmp_path)
    assert first.returncode == 0, first.stderr
    assert "took" in first.stderr  # progress reaches the user

    point_files = ("iterations.parquet", "meta.json", "requests.parquet", "summary.json")
    points = [f"tiny/{series}/rate-2/seed-0/{file}" for series in SERIES for file in point_files]
    logs = [f"{job}.log" for job in ("capacity", "collect", "draw", *(f"{series}-seed-0" for series in SERIES))]
    tables = ["tiny/capacity.csv", "tiny/points.csv"]
    assert files_in(tmp_path / "results") == sorted([*points, *tables, *(f"tiny/logs/{log}" for log in logs)])
    assert files_in(tmp_path / "figures") == ["tiny.pdf", "tiny.png"]

    table = pd.read_csv(tmp_path / "results/tiny/points.csv")
    assert list(table.columns[:7]) == ["experiment", "series", "label", "policy", "rate", "num_requests", "seed"]
    assert {"finished", "mean_normalized_latency_s", "p95_jct_s", "output_tokens_per_s"} <= set(table.columns)
    assert table["series"].tolist() == list(SERIES)
    assert (table["finished"] == 20).all()

    again = snakemake(tmp_path)
    assert again.returncode == 0
    assert "Nothing to be done" in again.stderr

    bytes_before = (tmp_path / "results/tiny/points.csv").read_bytes()
    repeated = snakemake(tmp_path, "--forceall", "results/tiny/points.csv")
    assert repeated.returncode == 0, repeated.stderr
    assert (tmp_path / "results/tiny/points.csv").read_bytes() == bytes_before


def test_bad_input_is_told_before_any_work(tmp_path):
    write_config(tmp_path, sedes=[0])
    refused = snakemake(tmp_path)
    assert refused.returncode != 0
    assert "sedes" in refused.stderr
    assert not (tmp_path / "results").exists()


def test_a_job_that_fails_halfway_says_why_and_leaves_only_its_log(tmp_path):
    trace = f"csv:{ROOT / 'traces' / 'fixtures' / 'lengths.csv'}"  # Four requests: enough for the first rate alone.
    points = [{"rate": 1, "num_requests": 3}, {"rate": 2, "num_requests": 30}]
    write_config(tmp_path, trace=trace, arrivals="trace", points=points)
    failed = snakemake(tmp_path, "results/tiny/points.csv")
    assert failed.returncode != 0
    assert "1 requests/s (1 of 2)" in failed.stderr
    assert "error: " in failed.stderr
    assert "fewer than the 30" in failed.stderr
    assert "Traceback" not in failed.stderr
    left = files_in(tmp_path / "results")
    assert left
    assert all(file.startswith("tiny/logs/") for file in left)
    assert "fewer than the 30" in (tmp_path / "results" / left[0]).read_text(encoding="utf-8")

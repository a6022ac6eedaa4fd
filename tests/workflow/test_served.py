"""Servers side by side: with our own server, and the rules around it. vLLM itself is not needed here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("torch")
pytest.importorskip("fastapi")

from fastserve.core.errors import ConfigError, ServerError
from fastserve.core.request import SamplingParams
from fastserve.llm import LLM
from harness.analysis.files import read_table
from harness.experiments.experiment import Experiment
from harness.report.plots import flags_of
from harness.studies.model_folder import write_model_folder
from harness.studies.served import COMPARED, compared_with_first, measure_served

ROOT = Path(__file__).resolve().parents[2]
POLICIES = ("fastserve-fcfs", "fastserve")
ARCHITECTURE = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "ffn_dim": 32,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 16,
}


def experiment(**changes):
    settings = {"max_batch_size": 2, "block_size": 8, "num_gpu_blocks": 32, "num_host_blocks": 32}
    return {
        "seeds": [3, 4],
        "architecture": ARCHITECTURE,
        "run": {"trace": "zipf:min=2,max=12", "torch_threads": 1, "settings": settings},
        "points": [{"x": "all at once", "num_requests": 6}, {"load": 0.5, "num_requests": 4}],
        "series": [{"name": policy, "label": policy.upper(), "policy": policy} for policy in POLICIES],
    } | changes


def test_the_tables_are_complete_and_follow_from_the_files(tmp_path):
    table = measure_served(experiment(), tmp_path)
    written = read_table(tmp_path / "points.csv").drop(columns="x")  # Of words and numbers: a CSV has words.
    pd.testing.assert_frame_equal(table.reset_index(drop=True).drop(columns="x"), written, check_dtype=False)
    assert table["series"].tolist() == [policy for policy in POLICIES for _ in range(4)]
    assert table["x"].tolist() == ["all at once", "all at once", 0.5, 0.5] * 2
    digests = {}
    for row in table.to_dict("records"):
        folder = Path(row["run"])
        assert {path.name for path in folder.iterdir()} == {
            *("requests.parquet", "iterations.parquet"),
            *("summary.json", "meta.json"),
        }
        summary, meta = (json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "meta"))
        assert summary["finished"] == row["finished"] == row["num_requests"]
        assert (summary["policy"], summary["backend"]) == (row["series"], "http")
        for metric in COMPARED:  # The answers of so small a model may come all at once: then some is null.
            expected = np.nan if summary[metric] is None else summary[metric]
            assert row[metric] == pytest.approx(expected, nan_ok=True), metric
        assert meta["configuration"]["vocab_size"] == 64
        assert meta["client"]["tokens_said_with_events"] == row["num_requests"]
        assert meta["client"]["tokens_unlike_events"] == meta["client"]["of_other_length"] == 0
        digests.setdefault((row["x"], row["seed"]), set()).add(meta["trace"]["digest"])
    assert all(len(found) == 1 for found in digests.values())  # The same requests for both.
    assert len(digests) == 4

    assert (table[["server_cores", "client_cores"]] > 0).all(axis=None)
    assert (table[["server_cores", "client_cores", "other_cores"]].sum(axis=1) < os.cpu_count() + 1).all()

    at_once = table[(table["x"] == "all at once") & (table["series"] == POLICIES[0])]
    service_rate = (at_once["num_requests"] / at_once["duration_s"]).median()
    assert table.loc[table["x"] == 0.5, "rate"].unique() == pytest.approx([0.5 * service_rate], rel=0.01)

    agreement = pd.read_csv(tmp_path / "agreement.csv")
    assert agreement["series"].tolist() == list(POLICIES)
    assert (agreement[["equal_answers", "equal_tokens"]] == 1.0).all(axis=None)
    servers = json.loads((tmp_path / "servers.json").read_text())
    assert servers["hardware"]["cores"] == os.cpu_count()
    for server, policy in zip(servers["servers"], POLICIES, strict=True):
        assert server["series"] == policy == server["model"]["policy"]
        assert server["server"] == "fastserve"
        assert server["version"]
        assert "--no-page" in server["command"]
        assert server["command"][server["command"].index("--torch-threads") + 1] == "1"
        assert "num_gpu_blocks=32" in server["command"]
        assert not is_answered(server["command"][server["command"].index("--port") + 1])


def is_answered(port):
    """Whether somebody still listens there."""
    code = f"import socket; socket.create_connection(('127.0.0.1', {int(port)}), 2)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_ratios_are_those_of_the_same_seed():
    def row(series, seed, value):
        values = dict.fromkeys(COMPARED, value)
        return {"series": series, "label": series, "x": "all at once", "seed": seed} | values

    rows = [("b", 0, 10.0), ("b", 1, 20.0), ("b", 2, 60.0), ("a", 0, 5.0), ("a", 1, 20.0), ("a", 2, 90.0)]
    found = compared_with_first(pd.DataFrame([row(*each) for each in rows]))
    assert len(found) == 2 * len(COMPARED)
    first, other = (found[found["series"] == name].iloc[0] for name in ("b", "a"))
    assert first[["median", "low", "high", "ratio_median"]].tolist() == [20, 10, 60, 1]
    assert other[["median", "low", "high"]].tolist() == [20, 5, 90]
    assert other[["ratio_median", "ratio_low", "ratio_high"]].tolist() == [1.0, 0.5, 1.5]


def test_a_server_that_cannot_serve_ends_all_with_its_last_words(tmp_path):
    config = experiment(series=experiment()["series"][:1])
    config["run"]["dtype"] = "float12"
    with pytest.raises(ServerError, match=r"FASTSERVE-FCFS ended by itself, with status 2(.|\n)*float12"):
        measure_served(config, tmp_path)
    assert not (tmp_path / "points.csv").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"points": [{"load": 0.5, "num_requests": 4}]},
            "the first point has no load, since its requests",
        ),
        ({"points": [{"num_requests": 4}, {"load": 0, "num_requests": 4}]}, "load must be a finite number above 0"),
        ({"series": [{"name": "a", "label": "A", "policy": "fcsf"}]}, "fcsf"),
        (
            {"series": [{"name": "a", "label": "A", "policy": "vllm", "server": "vllm"}]},
            "vLLM is not installed at None",
        ),
        ({"series": [{"name": "a", "label": "A", "policy": "vllm", "server": "x"}]}, "unknown server 'x'; known: fast"),
        ({"run": {"trace": "alpaca"}}, "set num_gpu_blocks and num_host_blocks"),
    ],
)
def test_bad_input_is_named_before_anything_is_started(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        measure_served(experiment(**changes), tmp_path)
    assert not (tmp_path / "logs").exists()


def test_a_model_folder_is_the_dummy_model_of_its_seed(tmp_path):
    config = write_model_folder(ARCHITECTURE, tmp_path / "model", seed=5)
    prompts = [[1, 2, 3], [40, 50]]
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    options = {"policy": "fastserve-fcfs", "num_gpu_blocks": 16, "num_host_blocks": 0}
    outputs = []
    for load_format, seed in (("auto", 0), ("dummy", 5)):
        with LLM(str(tmp_path / "model"), load_format=load_format, seed=seed, **options) as llm:
            outputs.append(
                [each.token_ids for each in llm.generate(prompt_token_ids=prompts, sampling_params=sampling)]
            )
    assert outputs[0] == outputs[1]
    assert len(set(map(tuple, outputs[0]))) == 2

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=True)
    assert len(tokenizer) == config.vocab_size == 64
    assert tokenizer.encode("w5 w63") == [5, 63]
    assert tokenizer.decode([5, 63]) == "w5 w63"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "w7 w8"}], tokenize=False)
    assert tokenizer.encode(chat) == [7, 8]

    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    write_model_folder(ARCHITECTURE, tmp_path / "model", seed=5)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def dry_run(folder, *arguments):
    """The rules of which a dry run lists jobs, and all that it says."""
    pytest.importorskip("snakemake")
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "-d", folder, "-c", "2", "--dry-run"]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    dry = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=180, env=environment)
    assert dry.returncode == 0, dry.stderr
    said = dry.stdout + dry.stderr
    return set(re.findall(r"^(?:local)?rule (\S+):", said, re.MULTILINE)), said


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_vllm_is_installed_for_its_target_from_the_file_of_the_machine(tmp_path, kind):
    arguments = ("--forcerun", "install_vllm", "--config", f"vllm={kind}", "--", "real-vllm")
    rules, said = dry_run(tmp_path, *arguments)
    assert rules == {"install_vllm", "measure_served", "draw", "real-vllm"}
    assert f"requirements-vllm-{kind}.txt" in said
    assert f"requirements-vllm-{'cuda' if kind == 'cpu' else 'cpu'}.txt" not in said


def test_nothing_else_installs_it(tmp_path):
    rules, _ = dry_run(tmp_path)
    assert {"simulate", "report"} <= rules
    assert not {"install_vllm", "measure_served"} & rules
    rules, _ = dry_run(tmp_path, "smoke")
    assert "measure_served" in rules
    assert "install_vllm" not in rules


def test_a_figure_tells_when_the_machine_did_something_else():
    drawn = Experiment.model_validate(experiment(title="T", figure="bars", backend="http")).model_dump()
    rows = [
        {"panel": "", "series": series, "label": series, "x": x, "seed": 3, "other_cores": others, "preemptions": 1}
        for series in POLICIES
        for x, others in (("all at once", 0.02), (0.5, 0.7))
    ]
    points = pd.DataFrame(rows)
    (flag,) = flags_of(drawn, points, None)
    assert flag.startswith("In 2 of 4 runs other processes used up to 0.7 cores")
    assert flags_of(drawn, points.assign(other_cores=0.02), None) == []

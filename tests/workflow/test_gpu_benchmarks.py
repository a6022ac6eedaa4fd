"""The benchmarks for a GPU run, on tiny sizes, where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/system:{ROOT}/workflows:{ROOT}"}
    command = [sys.executable, str(ROOT / f"benchmarks/{name}.py"), *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def results(name: str, out: Path, *arguments: str) -> dict[str, Any]:
    done = run(name, "--device", "cpu", "--out", str(out), *arguments)
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(out.read_text())
    assert content["meta"]["arguments"]["model"] == "opt-tiny"
    assert content["meta"]["versions"]["torch"]
    return content


def test_decode_steps_are_held_against_the_floor(tmp_path: Path) -> None:
    content = results("gpu_decode", tmp_path / "decode.json", "--repeats", "3")
    bandwidth = content["ceilings"]["copy_bytes_per_s"]
    one, four = content["decode"]
    # Of opt-tiny in float32: the layers' weights and the tied table once, and the cache of so many tokens.
    weights = 4 * (2 * (4 * 64 * 64 + 2 * 64 * 256) + 50_272 * 64)
    assert one["bytes"] == weights + (32 + 1) * 2 * 2 * 64 * 4
    assert four["floor_s"] == pytest.approx(four["bytes"] / bandwidth)
    assert four["ratio"] == pytest.approx(four["device_s"] / four["floor_s"])
    names = [product["name"] for product in one["matrix_products"]]
    assert names == ["q_proj+k_proj+v_proj", "out_proj", "fc1", "fc2", "model.decoder.embed_tokens"]
    *_, prefill = content["prefill"]
    assert prefill["flops"] == 2 * 2 * (4 * 64 * 64 + 2 * 64 * 256) * 128 + 2 * 2 * 64 * 128 * 129
    assert [target["met"] for target in content["targets"]] == [
        one["share_of_matmul_rate"] >= 0.6 for one in content["prefill"] if one["tokens"] == 128
    ]


def test_an_engines_iteration_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    content = results("gpu_engine", tmp_path / "engine.json", "--repeats", "3")
    assert [one["policy"] for one in content["runs"]] == ["fastserve-fcfs", "vllm", "fastserve"]
    for one in content["runs"] + content["host_alone"]:
        # Of the outputs the first token comes from the prompts, and the first decode follows those.
        assert one["iterations"] == 24 - 2
        assert min(one[f"{part}_s"] for part in ("iteration", "schedule", "submit", "collect", "update")) > 0
    # With steps that end as they begin, the host is what is left.
    assert all(host["iteration_s"] < one["iteration_s"] for host, one in zip(
        content["host_alone"], content["runs"], strict=True
    ))  # fmt: skip


def test_swapping_is_held_against_one_large_copy(tmp_path: Path) -> None:
    content = results("gpu_swap", tmp_path / "swap.json", "--repeats", "1")
    ceiling = content["ceiling_bytes_per_s"]
    assert [one["blocks"] for one in content["copier"]] == [1, 4, 16, 64]
    for one in (*content["copier"], content["layer_major"]):
        for way in ("out", "in", "both"):
            assert one["share_of_ceiling"][way] == pytest.approx(one["bytes_per_s"][way] / ceiling[way])
    assert content["block_bytes"] == 16 * 2 * 2 * 64 * 4


def test_the_peer_serves_the_same_requests_to_the_same_tokens(tmp_path: Path) -> None:
    content = results("gpu_peer", tmp_path / "peer.json", "--num-requests", "6", "--repeats", "1")
    peer = content["transformers"]
    assert [one["error"] for one in peer["runs"]] == [None]
    assert peer["equal_outputs"] == content["requests"] == 6
    for one in content["ours"]:
        assert one["tokens_per_s"] == pytest.approx(content["output_tokens"] / one["seconds"][0])
        assert one["ratio"] == pytest.approx(one["tokens_per_s"] / peer["runs"][0]["tokens_per_s"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["--device", "cpu", "--out", "/proc/x.json"], "cannot write /proc/x.json"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    done = run("gpu_decode", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1

"""`fastbench run --backend http` measures servers of other projects, as they are."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from baselines.external.process import ServerProcess, free_port
from fastserve.core.errors import NothingFinishedError, ServerError
from harness.run.config import RunConfig
from harness.run.runner import run
from harness.studies.model_folder import write_model_folder
from support.clients import command_of

READY_WITHIN_S = 180.0
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip
TTFT_S, TPOT_S = 0.2, 0.05
"""Of guidellm's mock server, which keeps them to a few milliseconds."""


@contextmanager
def running(command: Sequence[str | Path], port: int, folder: Path) -> Iterator[str]:
    """Start the command and return its server's address; its models come from directories only."""
    url = f"http://127.0.0.1:{port}"
    variables = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": None}
    with ServerProcess(str(command[0]), list(map(str, command)), url, folder / "server.log", variables) as server:
        server.wait_until_ready(READY_WITHIN_S)
        yield url


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model_folder(LLAMA, folder)
    return folder


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    command = [
        command_of("guidellm"), "mock-server", "--port", str(port), "--model", "mock", "--ttft-ms", f"{1000 * TTFT_S}",
        "--itl-ms", f"{1000 * TPOT_S}",
    ]  # fmt: skip
    with running(command, port, tmp_path_factory.mktemp("guidellm")) as url:
        yield url


@pytest.fixture(scope="module")
def transformers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    command = [command_of("transformers"), "serve", model, "--port", str(port), "--host", "127.0.0.1",
               "--device", "cpu"]  # fmt: skip
    with running(command, port, tmp_path_factory.mktemp("transformers")) as url:
        yield url


def measured(url: str, out: Path, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the summary and the finished requests of a run."""
    summary = run(
        RunConfig(
            **{"backend": "http", "url": url, "trace": "fixed:prompt=5,output=8", "rate": 2.0, "num_requests": 6}
            | changes
        ),
        out,
    )
    rows = pq.read_table(out / "requests.parquet").to_pylist()
    return summary, [row for row in rows if row["status"] == "finished"]


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_guidellms_mock_server_is_measured_as_it_was_set(mock: str, model: Path, tmp_path: Path, endpoint: str) -> None:
    summary, rows = measured(mock, tmp_path, prompts="text", tokenizer=str(model), endpoint=endpoint)
    assert (summary["finished"], summary["failed"], summary["policy"]) == (6, 0, "guidellm-mock")
    assert {(row["output_tokens"], len(row["token_s"])) for row in rows} == {(8, 8)}
    assert TTFT_S - 0.01 < summary["p50_ttft_s"] < TTFT_S + 0.1
    assert TPOT_S - 0.01 < summary["p50_tpot_s"] < TPOT_S + 0.02
    assert summary["p50_max_token_gap_s"] < 2 * TPOT_S
    assert not [line for line in json.loads((tmp_path / "meta.json").read_text())["warnings"] if "late" not in line]


def test_guidellms_mock_server_takes_no_token_ids_and_the_error_says_what_to_do(mock: str, tmp_path: Path) -> None:
    with pytest.raises(NothingFinishedError, match=r"HTTP 400: .*needs --prompts text --tokenizer DIR"):
        measured(mock, tmp_path)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_transformers_serve_is_measured(transformers: str, model: Path, tmp_path: Path, endpoint: str) -> None:
    """It refuses ignore_eos, lists no model in a folder, ends streams without [DONE], and says its usage in an event
    that has an empty choice."""
    summary, rows = measured(
        transformers, tmp_path, model=str(model), ignore_eos=False, prompts="text", tokenizer=str(model),
        endpoint=endpoint,
    )  # fmt: skip
    assert (summary["finished"], summary["failed"]) == (6, 0)
    for row in rows:
        assert 0 < row["output_tokens"] <= 8
        assert len(row["token_s"]) <= row["output_tokens"]
        assert row["arrival_s"] < row["sent_s"] < row["token_s"][0]
    # A small model may give all its text in one event; that request then shows no time to first token.
    streamed = [row for row in rows if row["first_token_s"] is not None and not math.isnan(row["first_token_s"])]
    assert streamed
    assert all(row["sent_s"] < row["first_token_s"] < row["finished_s"] for row in streamed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"answered 500: .*name one with --model"),
        ({"model": "MODEL"}, r"HTTP 422: .*ignore_eos.*: add --no-ignore-eos"),
        ({"model": "MODEL", "ignore_eos": False}, r"HTTP 400: prompt must be a string.*needs --prompts text"),
        ({"model": "nowhere", "ignore_eos": False}, r"request warmup-0 of the warm-up was .*; the server lists no mod"),
    ],
)
def test_transformers_serve_is_told_what_to_leave_out(
    transformers: str, model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ServerError, match=message):
        measured(transformers, tmp_path, **changes | ({"model": str(model)} if "MODEL" in changes.values() else {}))
    assert not list(tmp_path.iterdir())

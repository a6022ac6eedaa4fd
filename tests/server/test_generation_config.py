"""Defaults of a model: end tokens in any of its files, and sampling in generation_config.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("uvicorn")

from fastserve import LLM, SamplingParams
from fastserve.core.config import EngineOptions, ModelSource, Processes
from fastserve.core.errors import CheckpointError, ConfigError
from fastserve.core.generation_config import GenerationConfig, load_generation_config
from fastserve.server.model import load_served_model
from fastserve.server.options import ModelOptions
from support.servers import RunningServer, running
from support.tokenizers import of_words
from support.tokens import save_model

PROMPT = [5, 6, 7]
LENGTH = 24
SIZES: dict[str, Any] = {"num_gpu_blocks": 32, "num_host_blocks": 0, "max_batch_size": 2}
GREEDY = {"prompt": PROMPT, "max_tokens": LENGTH, "return_token_ids": True, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model without a tokenizer whose config.json names one end token, which it does not generate."""
    path = tmp_path_factory.mktemp("model")
    save_model("opt", path, num_layers=1)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
    (path / "generation_config.json").unlink()
    return path


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A copy of the model, which a test may change."""
    return Path(shutil.copytree(model, tmp_path / "model"))


def offline(folder: Path, **arguments: Any) -> list[int]:
    """Return the greedy output up to an end token."""
    with LLM(folder, policy="fastserve-fcfs", **SIZES, **arguments) as llm:
        (output,) = llm.generate(prompt_token_ids=[PROMPT], sampling_params=SamplingParams(max_tokens=LENGTH))
    return output.token_ids


@pytest.fixture(scope="module")
def free(model: Path) -> list[int]:
    """The greedy output without an end token."""
    tokens = offline(model)
    assert len(tokens) == LENGTH
    return tokens


def served(folder: Path, **options: Any) -> Callable[[], Any]:
    sizes = EngineOptions(**SIZES)
    return partial(
        load_served_model,
        ModelOptions(
            ModelSource(str(folder)), "fastserve-fcfs", engine=sizes, processes=Processes(torch_threads=1), **options
        ),
    )


def tokens_of(server: RunningServer, body: dict[str, Any]) -> tuple[list[int], str]:
    (choice,) = server.post(body).json["choices"]
    return choice["token_ids"], choice["finish_reason"]


def say_in_generation_config(folder: Path, end: int) -> None:
    write(folder, eos_token_id=[499, end])


def say_in_tokenizer(folder: Path, end: int) -> None:
    tokenizer = of_words()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    tokenizer.save_pretrained(folder)


def write(folder: Path, **content: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("say", [say_in_generation_config, say_in_tokenizer])
def test_an_end_token_named_in_one_file_ends_an_output(
    folder: Path, free: list[int], say: Callable[[Path, int], None]
) -> None:
    end = free[6]
    expected = free[: free.index(end) + 1]
    say(folder, end)
    assert offline(folder) == expected
    with running(served(folder)) as server:
        assert tokens_of(server, GREEDY) == (expected, "stop")
        assert tokens_of(server, GREEDY | {"ignore_eos": True}) == (free, "length")
        # The end token of config.json still counts.
        assert set(server.engine.eos_token_ids) >= {2, end}


def test_generation_config_can_be_ignored(folder: Path, free: list[int]) -> None:
    write(folder, eos_token_id=free[6], temperature=0.0, top_k=1)
    assert offline(folder, generation_config="none") == free
    with running(served(folder, generation_config="none")) as server:
        assert tokens_of(server, GREEDY) == (free, "length")
        drawn = {name: value for name, value in GREEDY.items() if name != "temperature"}
        assert tokens_of(server, drawn | {"seed": 1})[0] != free


@pytest.mark.parametrize("says", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_it_gives_defaults_for_sampling(folder: Path, free: list[int], says: dict[str, float]) -> None:
    write(folder, **says)
    ((name, _),) = says.items()
    ask = {"prompt": PROMPT, "max_tokens": LENGTH, "return_token_ids": True, "seed": 1}
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    with running(served(folder)) as server:
        assert tokens_of(server, ask)[0] == free
        # Null is no other value; the request's own value is the only change.
        assert tokens_of(server, ask | {name: None})[0] == free
        drawn = tokens_of(server, ask | {name: neutral[name]})[0]
        assert drawn != free
        assert drawn == tokens_of(server, ask | neutral)[0]


def test_it_bounds_a_chat_that_sets_no_limit(folder: Path) -> None:
    of_words().save_pretrained(folder)
    write(folder, max_new_tokens=7, temperature=0.0)
    with running(served(folder)) as server:
        body = {"messages": [{"role": "user", "content": "w1"}], "ignore_eos": True}
        answers = [server.post(body | more, "/v1/chat/completions").json for more in ({}, {"max_tokens": 9})]
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [7, 9]


def test_the_fields_that_are_read(tmp_path: Path) -> None:
    assert load_generation_config(tmp_path) == load_generation_config(None) == GenerationConfig()
    write(tmp_path, eos_token_id=3, top_k=None, do_sample=True, temperature=0.6, bos_token_id=1)
    assert load_generation_config(tmp_path) == GenerationConfig((3,), {"temperature": 0.6})
    sampling = {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "min_p": 0.1, "repetition_penalty": 1.1}
    write(tmp_path, **sampling, max_new_tokens=100, eos_token_id=[3, 4])
    assert load_generation_config(tmp_path) == GenerationConfig((3, 4), sampling, 100)
    with pytest.raises(ConfigError, match="generation_config must be auto or none, got 'vllm'"):
        load_generation_config(tmp_path, "vllm")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"top_p": 1.5}', r"top_p must be in \(0, 1\], got 1.5"),
        ('{"temperature": "hot"}', "temperature must be a number, got 'hot'"),
        ('{"temperature": -1}', "temperature must be a finite number of at least 0, got -1"),
        ('{"top_k": 1.5}', "top_k must be an integer of at least 0, got 1.5"),
        ('{"eos_token_id": ["a"]}', "eos_token_id must be an integer of at least 0, got 'a'"),
        ('{"max_new_tokens": 0}', "max_new_tokens must be an integer of at least 1, got 0"),
        ("[]", "it holds list, not an object"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "recursion"),
        ("\xff", "decode"),
    ],
)
def test_errors_name_the_file_and_the_fault(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "generation_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_generation_config(tmp_path)
    assert str(tmp_path / "generation_config.json") in str(caught.value)
    assert "ignore it with generation_config none" in str(caught.value)
    assert load_generation_config(tmp_path, "none") == GenerationConfig()

"""Parameters beyond temperature over HTTP: choices, sampling, ends of outputs, truncated prompts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("uvicorn")

from fastserve import SamplingParams
from fastserve.core.config import EngineOptions, ModelSource, Processes
from fastserve.server.model import load_served_model
from fastserve.server.options import ModelOptions
from support.parameters import PlainModel
from support.servers import DONE, RunningServer, running, simulated
from support.tokenizers import of_words
from support.tokens import prompts, save_model

NEW = 12


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("sampled")
    save_model("llama", path, 2)
    of_words().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[RunningServer]:
    options = EngineOptions(max_batch_size=8, num_gpu_blocks=100, num_host_blocks=0)
    build = partial(
        load_served_model,
        ModelOptions(
            ModelSource(str(directory)),
            engine=options,
            profile="a100-80g/opt-13b-tp1-swifttransformer",
            processes=Processes(torch_threads=1),
        ),
    )
    with running(build) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def model(directory: Path) -> PlainModel:
    return PlainModel(directory)


def ask(server: RunningServer, path: str = "/v1/completions", **body: Any) -> Any:
    defaults = {"max_tokens": NEW, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    reply = server.post(defaults | body, path)
    assert reply.status == 200, reply.content
    return reply.json


def tokens(server: RunningServer, **body: Any) -> list[int]:
    (choice,) = ask(server, **body)["choices"]
    ids: list[int] = choice["token_ids"]
    return ids


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 3.0},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"logit_bias": {"9": 50.0}},
        {"allowed_token_ids": [20, 30, 40]},
        {"logit_bias": {"9": 50.0}, "frequency_penalty": 2.0, "repetition_penalty": 1.5},
    ],
    ids=lambda asked: " ".join(asked),
)
def test_what_changes_the_logits(server: RunningServer, model: PlainModel, asked: dict[str, Any]) -> None:
    prompt = prompts()[0]
    numbers = {int(token): bias for token, bias in asked.get("logit_bias", {}).items()}
    params = SamplingParams(max_tokens=NEW, ignore_eos=True, **asked | ({"logit_bias": numbers} if numbers else {}))
    assert tokens(server, prompt=prompt, **asked) == model.generate(prompt, params, ())


def test_drawing_from_the_likeliest_token_is_greedy(server: RunningServer) -> None:
    prompt = prompts()[1]
    assert tokens(server, prompt=prompt, temperature=1.5, min_p=1.0, seed=3) == tokens(server, prompt=prompt)


def test_choices_draw_with_one_seed_after_the_other(server: RunningServer) -> None:
    some = prompts()[:2]
    answer = ask(server, prompt=some, n=3, temperature=1, seed=40)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    expected = [tokens(server, prompt=prompt, temperature=1, seed=40 + i) for prompt in some for i in range(3)]
    assert [choice["token_ids"] for choice in answer["choices"]] == expected
    assert len(set(map(tuple, expected))) == 6
    # A prompt counts once.
    assert answer["usage"]["prompt_tokens"] == sum(map(len, some))
    assert answer["usage"]["completion_tokens"] == 6 * NEW
    # Without a seed choices differ, too; the largest seed has a successor.
    for asked in ({}, {"seed": 2**63 - 1}):
        choices = ask(server, prompt=some[0], n=2, temperature=1, **asked)["choices"]
        assert choices[0]["token_ids"] != choices[1]["token_ids"]
    # The engine takes each choice as one request.
    before = server.server.metrics.totals["requests"]
    chat = ask(server, "/v1/chat/completions", messages=[{"role": "user", "content": "w1"}], n=4, temperature=1)
    assert len({choice["message"]["content"] for choice in chat["choices"]}) == 4
    assert server.server.metrics.totals["requests"] == before + 4


def test_streamed_choices_are_those_of_a_whole_answer(server: RunningServer) -> None:
    body = {"prompt": prompts()[:2], "n": 2, "temperature": 1, "seed": 7, "max_tokens": NEW, "ignore_eos": True}
    whole = ask(server, **body)
    streamed: list[list[int]] = [[], [], [], []]
    for event in server.stream(**body, return_token_ids=True):
        if event != DONE:
            (choice,) = event["choices"]
            streamed[choice["index"]] += choice["token_ids"]
    assert streamed == [choice["token_ids"] for choice in whole["choices"]]


def test_usage_in_every_event(server: RunningServer) -> None:
    some = prompts()[:2]
    body = {"prompt": some, "temperature": 0, "max_tokens": 5, "ignore_eos": True}
    for include in (True, False):
        options = {"continuous_usage_stats": True, "include_usage": include}
        events = [event for event in server.stream(**body, stream_options=options) if event != DONE]
        counts = [0, 0]
        for event in events[:10]:
            (choice,) = event["choices"]
            index = choice["index"]
            counts[index] += 1
            size = len(some[index])
            usage = {"prompt_tokens": size, "completion_tokens": counts[index], "total_tokens": size + counts[index]}
            assert event["usage"] == usage
        rest = [
            {"prompt_tokens": sum(map(len, some)), "completion_tokens": 10, "total_tokens": sum(map(len, some)) + 10}
        ]
        assert [event["usage"] for event in events[10:]] == (rest if include else [])


def test_usage_in_every_event_of_a_chat(server: RunningServer) -> None:
    events = list(
        server.stream(
            "/v1/chat/completions",
            messages=[{"role": "user", "content": "w1"}],
            max_tokens=4,
            ignore_eos=True,
            stream_options={"continuous_usage_stats": True},
        )
    )
    # The event with the role precedes the first token.
    assert [event["usage"]["completion_tokens"] for event in events[:-1]] == [0, 1, 2, 3, 4]
    assert events[-1] == DONE


def test_no_end_before_min_tokens(server: RunningServer, model: PlainModel) -> None:
    prompt = prompts()[2]
    plain = tokens(server, prompt=prompt)
    end = plain[2]
    first = plain.index(end) + 1
    assert tokens(server, prompt=prompt, stop_token_ids=[end]) == plain[:first]
    for least in (first, NEW - 1):
        params = SamplingParams(max_tokens=NEW, min_tokens=least, stop_token_ids=(end,), ignore_eos=True)
        found = tokens(server, prompt=prompt, stop_token_ids=[end], min_tokens=least)
        assert found == model.generate(prompt, params, ())
        assert len(found) >= least
        assert end not in found[:least]
    # No stop text is looked for, either.
    text = f"w{plain[2] - 3}"
    (choice,) = ask(server, prompt=prompt, stop=text)["choices"]
    assert len(choice["token_ids"]) == first
    (choice,) = ask(server, prompt=prompt, stop=text, min_tokens=first)["choices"]
    assert choice["token_ids"][:first] == plain[:first]
    assert len(choice["token_ids"]) > first


def test_the_end_can_be_part_of_the_text(server: RunningServer) -> None:
    prompt = prompts()[3]
    words = [f"w{token - 3}" for token in tokens(server, prompt=prompt)]
    end = words[4]
    cut = " ".join(words[: words.index(end)])
    for asked in ({"stop": end}, {"stop_token_ids": [int(end[1:]) + 3]}):
        (choice,) = ask(server, prompt=prompt, **asked)["choices"]
        assert choice["text"].strip() == cut
        body = {"prompt": prompt, "include_stop_str_in_output": True, **asked}
        (choice,) = ask(server, **body)["choices"]
        assert choice["text"].strip() == f"{cut} {end}".strip()
        assert choice["finish_reason"] == "stop"
        events = server.stream(**body, max_tokens=NEW, temperature=0, ignore_eos=True)
        assert "".join(event["choices"][0]["text"] for event in events if event != DONE) == choice["text"]


def test_the_end_of_a_prompt_is_used(server: RunningServer) -> None:
    prompt = [*range(100, 140)]
    for most in (1, 7, 40, 100):
        answer = ask(server, prompt=prompt, truncate_prompt_tokens=most)
        assert answer["usage"]["prompt_tokens"] == min(most, 40)
        assert answer["choices"][0]["token_ids"] == tokens(server, prompt=prompt[-most:])
    longer = [3 + i % 400 for i in range(400)]
    answer = ask(server, prompt=longer, truncate_prompt_tokens=-1)
    assert answer["usage"] == {"prompt_tokens": 256 - NEW, "completion_tokens": NEW, "total_tokens": 256}
    text = " ".join(f"w{i}" for i in range(30))
    (choice,) = ask(server, prompt=text, truncate_prompt_tokens=3, echo=True, max_tokens=0)["choices"]
    assert choice["text"] == "w27 w28 w29"


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"prompt": [[5]] * 9, "n": 114}, "n", "114 outputs for each of 9 prompts are more than 1024"),
        ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty", "greater than or equal to -2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
        ({"logit_bias": {"500": 1}}, "logit_bias", "token id 500; the model's vocabulary has ids from 0 to 499"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "at least 1"),
        ({"allowed_token_ids": [9, 500]}, "allowed_token_ids", "token id 500"),
        ({"min_tokens": 13}, "min_tokens", "min_tokens=13 is more than the 12 tokens of output at most"),
        (
            {"min_tokens": 1, "allowed_token_ids": [9], "stop_token_ids": [9]},
            "allowed_token_ids",
            "has only tokens that end the output",
        ),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least one token"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "greater than or equal to -1"),
    ],
)
def test_invalid_sampling_parameters(server: RunningServer, body: dict[str, Any], param: str, says: str) -> None:
    reply = server.post({"prompt": [5], "max_tokens": NEW} | body)
    assert reply.status == 400
    assert reply.error["param"] == param
    assert says in reply.error["message"]


def test_a_simulation_accepts_fields_that_only_change_the_draw() -> None:
    asked = {
        "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 2, "logit_bias": {"7": 1},
        "allowed_token_ids": [3], "min_tokens": 4, "stop_token_ids": [2], "truncate_prompt_tokens": 2, "n": 2,
    }  # fmt: skip
    with running(simulated) as server:
        answer = server.post({"prompt": [1, 2, 3], "max_tokens": 6, "return_token_ids": True} | asked).json
        # Before min_tokens a stop token ends nothing.
        assert [choice["token_ids"] for choice in answer["choices"]] == [[0, 1, 2, 3, 4, 5]] * 2
        assert answer["usage"]["prompt_tokens"] == 2
        body = {"prompt": [1], "max_tokens": 6, "return_token_ids": True, "stop_token_ids": [4], "min_tokens": 4}
        assert server.post(body).json["choices"][0]["token_ids"] == [0, 1, 2, 3, 4]
        # Each output computes the prompt for itself.
        reply = server.post({"prompt": [1] * 60_000, "max_tokens": 1, "n": 5})
        assert (reply.status, reply.error["param"]) == (400, "n")
        assert "300000 prompt tokens, counted for each of the n outputs, are more than 262144" in reply.error["message"]

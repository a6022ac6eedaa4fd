"""The openai package works with the server unchanged: requests are understood, and answers have its types."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("transformers")
pytest.importorskip("openai")

import openai

from fastserve.server.options import ServerOptions
from support.servers import RunningServer, running, simulated
from support.tokenizers import of_words

KEY = "secret-1"
USER: Any = {"role": "user", "content": "w1 w2"}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """It generates the words w0, w1, w2, …"""
    with running(partial(simulated, tokenizer=of_words()), ServerOptions(api_key=KEY, max_requests=100)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("quick", "model", "fastserve")
    assert client.models.retrieve("quick") == model
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] == 4096 * 16 + 1


def test_a_completion(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="quick", prompt="w1 w2", max_tokens=5)
    (choice,) = completion.choices
    assert (choice.text, choice.finish_reason, choice.index, choice.logprobs) == (" w0 w1 w2 w3 w4", "length", 0, None)
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (2, 5)
    assert completion.object == "text_completion"


@pytest.mark.parametrize("prompt", [["w1 w2", "w3"], [[4, 5], [6]]])
def test_several_completions(client: openai.OpenAI, prompt: list[str] | list[list[int]]) -> None:
    completion = client.completions.create(model="quick", prompt=prompt, max_tokens=4)
    assert [(choice.index, choice.text) for choice in completion.choices] == [(i, " w0 w1 w2 w3") for i in (0, 1)]
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == 3


def test_a_stream_of_completions(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="quick", prompt=[4, 5], max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert [chunk.choices[0].text for chunk in chunks] == [" w0", " w1", " w2", " w3", " w4"]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 4 + ["length"]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == 7


def test_a_chat(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model="quick", messages=[USER], max_completion_tokens=9, stop=["w3 w4"], seed=1, temperature=0.5, top_p=0.9
    )
    (choice,) = completion.choices
    assert (choice.message.role, choice.message.content) == ("assistant", " w0 w1 w2 ")
    assert (choice.finish_reason, choice.model_extra) == ("stop", {"stop_reason": "w3 w4"})
    assert completion.system_fingerprint is not None
    assert completion.system_fingerprint.startswith("fastserve-")
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 5


def test_the_newer_name_of_max_tokens_wins(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(model="quick", messages=[USER], max_completion_tokens=4, max_tokens=9)
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 4


def test_a_stream_of_a_chat(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="quick", messages=[USER], max_tokens=6, stream=True, stream_options={"include_usage": True}
    )
    first, *chunks, last = list(stream)
    assert first.choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in chunks] == [f" w{i}" for i in range(6)]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.usage is not None
    assert last.usage.completion_tokens == 6


def test_the_clients_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="quick", messages=[USER], max_tokens=9, stop="w3") as stream:
        for _ in stream:
            pass
        completion = stream.get_final_completion()
    assert completion.choices[0].message.content == " w0 w1 w2 "


def test_a_stream_that_is_closed_is_aborted(client: openai.OpenAI, server: RunningServer) -> None:
    before = server.watcher.outcomes["aborted"]
    with client.completions.create(model="quick", prompt=[4], max_tokens=50_000, stream=True) as stream:
        next(iter(stream))
    server.until(lambda: server.watcher.outcomes["aborted"] == before + 1)
    server.check_empty()


def test_many_streams_at_a_time(server: RunningServer) -> None:
    async def ask(client: openai.AsyncOpenAI, length: int) -> list[str]:
        stream = await client.chat.completions.create(model="quick", messages=[USER], max_tokens=length, stream=True)
        return [chunk.choices[0].delta.content or "" async for chunk in stream]

    async def ask_all() -> list[list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(ask(client, 3 + number % 20) for number in range(60)))

    for number, pieces in enumerate(asyncio.run(ask_all())):
        # The role, and then a word a token.
        assert pieces == ["", *(f" w{i}" for i in range(3 + number % 20))]


def test_each_refusal_raises_the_clients_error_for_it(server: RunningServer, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"suffix: .x. is not supported by this server") as bad:
        client.completions.create(model="quick", prompt=[1], suffix="x")
    assert (bad.value.param, bad.value.type) == ("suffix", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="quick", prompt=[1], max_tokens=10**6)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="model 'gpt' is not served here; this server has 'quick'") as gone:
        client.chat.completions.create(model="gpt", messages=[USER])
    assert gone.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt/4")
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong") as stranger:
        client.with_options(api_key="wrong").models.list()
    assert stranger.value.code == "invalid_api_key"


def test_the_client_tries_again_when_the_queue_is_full() -> None:
    with (
        running(partial(simulated, iteration_s=0.002), ServerOptions(max_requests=1)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client,
    ):
        long = server.stream(prompt=[1], max_tokens=50_000, return_token_ids=True)
        assert long.tokens(2) == [0, 1]
        with pytest.raises(openai.RateLimitError, match="the queue is full: 1 of 1 requests are unfinished") as full:
            client.completions.create(model="quick", prompt=[1], max_tokens=2)
        assert int(full.value.response.headers["retry-after"]) >= 1
        # The next refusal makes room, which the client finds after Retry-After.
        refused = threading.Event()
        count = server.server.metrics.refused

        def refuse(num_requests: int) -> None:
            count(num_requests)
            refused.set()
            long.close()

        server.server.metrics.refused = refuse  # type: ignore[method-assign]
        completion = client.with_options(max_retries=1).completions.create(model="quick", prompt=[1], max_tokens=2)
        assert refused.is_set()
        assert completion.choices[0].text == " 0 1"

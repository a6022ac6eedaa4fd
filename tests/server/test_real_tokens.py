"""Small real models behind HTTP: tokens equal those of an undisturbed run, and texts are those of the tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from fastserve import LLM, SamplingParams  # noqa: E402
from support.real_models import served  # noqa: E402
from support.servers import DONE, RunningServer, running  # noqa: E402
from support.tokenizers import of_bytes, of_words  # noqa: E402
from support.tokens import NUM_REQUESTS, NUM_TOKENS, Reference, make_reference, prompts  # noqa: E402

SEED = 11


@pytest.fixture(scope="module", params=["opt", "llama"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """OPT with a tokenizer of words, Llama with one of bytes, and what transformers generates with them."""
    directory, expected = make_reference(request.param, tmp_path_factory.mktemp(request.param))
    tokenizer = {"opt": of_words, "llama": of_bytes}[request.param]()
    tokenizer.save_pretrained(directory)
    return directory, expected


@pytest.fixture(scope="module")
def roomy(reference: Reference) -> Iterator[RunningServer]:
    """The model, with a cache for all requests."""
    with running(served(reference[0], "fastserve", {}, 100)) as server:
        yield server


@pytest.fixture(scope="module")
def tokenizer(reference: Reference) -> Any:
    from fastserve.core.tokenizer import load_tokenizer

    return load_tokenizer(reference[0])


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("fastserve", {"swap": "proactive"}),
        ("mlfq", {"swap": "reactive"}),
        ("fastserve", {"swap": "recompute"}),
        ("vllm-chunked", {"chunk_tokens": 8}),
        ("run-to-completion", {}),
    ],
)
def test_greedy_tokens_over_http_are_those_of_an_undisturbed_run(
    reference: Reference, policy: str, options: dict[str, Any]
) -> None:
    directory, expected = reference

    async def ask_all(url: str) -> tuple[list[list[int]], list[list[int]]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
            ask = partial(
                client.completions.create,
                model="small",
                max_tokens=NUM_TOKENS,
                temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )

            async def streamed(prompt: list[int]) -> list[int]:
                chunks = [chunk async for chunk in await ask(prompt=prompt, stream=True)]
                assert [len(chunk.choices[0].token_ids) for chunk in chunks] == [1] * NUM_TOKENS
                return [chunk.choices[0].token_ids[0] for chunk in chunks]

            async def whole(prompt: list[int]) -> list[int]:
                tokens: list[int] = (await ask(prompt=prompt)).choices[0].token_ids
                return tokens

            streams = asyncio.gather(*map(streamed, prompts()))
            return await streams, await asyncio.gather(*map(whole, prompts()))

    with running(served(directory, policy, options)) as server:
        streamed, whole = asyncio.run(ask_all(server.url))
        server.check_empty()
        jobs = server.watcher.jobs.values()
        swapped = sum(job.swap_out_bytes for job in jobs)
        recomputed = sum(job.recomputed_tokens for job in jobs)
    assert streamed == expected
    assert whole == expected
    assert (swapped > 0) == (options.get("swap") in ("proactive", "reactive"))
    assert (recomputed > 0) == (options.get("swap") == "recompute" or policy == "vllm-chunked")


def test_the_text_is_that_of_the_tokens(reference: Reference, roomy: RunningServer, tokenizer: Any) -> None:
    # The first token would complete a character at the prompt's end.
    ended = [prompt + tokenizer.encode("w1") for prompt in prompts()]
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(reference[0], policy="fastserve-fcfs", num_gpu_blocks=100, num_host_blocks=0) as llm:
        outputs = llm.generate(prompt_token_ids=ended, sampling_params=params)
    body: dict[str, Any] = {"prompt": ended, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    whole = [choice["text"] for choice in roomy.post(body).json["choices"]]
    streamed = [""] * NUM_REQUESTS
    for event in roomy.stream(**body):
        if event != DONE:
            (choice,) = event["choices"]
            streamed[choice["index"]] += choice["text"]
    assert streamed == whole
    # Words after other words begin with a space.
    assert [text.removeprefix(" ") for text in whole] == [(output.text or "").removeprefix(" ") for output in outputs]
    assert any(whole)


def test_a_prompt_is_text_or_its_tokens(roomy: RunningServer, tokenizer: Any) -> None:
    texts = ["w1 w2 w3", "hello 東京"]
    body = {"max_tokens": 4, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    as_text = roomy.post({**body, "prompt": texts}).json
    as_tokens = roomy.post({**body, "prompt": [tokenizer.encode(text) for text in texts]}).json
    assert [c["token_ids"] for c in as_text["choices"]] == [c["token_ids"] for c in as_tokens["choices"]]
    assert as_text["usage"] == as_tokens["usage"]
    assert as_text["usage"]["prompt_tokens"] == sum(len(tokenizer.encode(text)) for text in texts)


def test_a_chat_is_its_template_completed(roomy: RunningServer, tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "w5"}, {"role": "user", "content": "w1 東京"}]
    body = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    chat = roomy.post({**body, "messages": messages}, "/v1/chat/completions").json
    completion = roomy.post({**body, "prompt": text}).json
    assert chat["choices"][0]["token_ids"] == completion["choices"][0]["token_ids"]
    assert chat["choices"][0]["message"]["content"] == completion["choices"][0]["text"]
    assert chat["usage"] == completion["usage"]


def test_the_same_seed_draws_the_same_tokens(roomy: RunningServer) -> None:
    def draw(**body: Any) -> list[int]:
        body = {"prompt": [5, 6, 7], "max_tokens": 16, "ignore_eos": True, "return_token_ids": True} | body
        tokens: list[int] = roomy.post(body).json["choices"][0]["token_ids"]
        return tokens

    greedy = draw(temperature=0)
    with ThreadPoolExecutor(4) as clients:  # A token depends on no other request.
        one, two, other, _ = clients.map(lambda seed: draw(seed=seed), [SEED, SEED, SEED + 1, None])
    assert one == two
    assert other != one != greedy
    assert draw(seed=SEED, temperature=0) == draw(seed=SEED, top_k=1) == draw(seed=SEED, top_p=1e-9) == greedy
    # Without a seed, another one each time.
    assert draw() != draw()
    # Any 64-bit integer is a seed.
    for seed in (-1, -(2**63), 2**63 - 1):
        assert draw(seed=seed) == draw(seed=seed)


def test_the_end_of_sequence_ends_an_answer(roomy: RunningServer, reference: Reference) -> None:
    prompt, expected = prompts()[0], reference[1][0]
    end = expected[5]
    count = expected.index(end) + 1
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "return_token_ids": True}

    def ask(**more: Any) -> tuple[list[int], str, str]:
        (choice,) = roomy.post(body | more).json["choices"]
        return choice["token_ids"], choice["finish_reason"], choice["text"]

    engine = roomy.engine
    eos = engine.eos_token_ids
    roomy.call(lambda: setattr(engine, "eos_token_ids", (499, end)))
    try:
        tokens, reason, text = ask()
        assert (tokens, reason) == (expected[:count], "stop")
        # It is a token of the output, without text.
        *before, last = [event for event in roomy.stream(**body) if event != DONE]
        assert "".join(event["choices"][0]["text"] for event in before) == text
        assert last["choices"][0]["token_ids"] == [end]
        assert last["choices"][0]["text"] == ""
        assert last["choices"][0]["finish_reason"] == "stop"
        assert last["choices"][0]["stop_reason"] is None  # The model's own end.
        assert ask(ignore_eos=True)[:2] == (expected, "length")
        # If it is also the last token of max_tokens, it is still the reason.
        assert ask(max_tokens=count)[:2] == (expected[:count], "stop")
    finally:
        roomy.call(lambda: setattr(engine, "eos_token_ids", eos))
    assert ask(stop_token_ids=[end]) == (tokens, "stop", text)
    assert ask(stop_token_ids=[end], ignore_eos=True) == (tokens, "stop", text)
    assert roomy.get("/page/state").json["recent"][0]["finish_reason"] == "stop"


def test_a_stop_text_that_spans_tokens(roomy: RunningServer, reference: Reference, tokenizer: Any) -> None:
    body: dict[str, Any] = {"prompt": prompts()[1], "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    text = roomy.post(body).json["choices"][0]["text"]
    for start, end in ((0, 1), (0, 4), (2, 7), (len(text) // 2, len(text) // 2 + 5), (len(text) - 3, len(text))):
        stop = text[start:end]
        cut = text[: text.index(stop)]
        (choice,) = roomy.post(body | {"stop": stop}).json["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (cut, "stop", stop), (text, stop)
        events = [event["choices"][0] for event in roomy.stream(**body, stop=[stop, "never said"]) if event != DONE]
        assert "".join(event["text"] for event in events) == cut
        assert [event["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["stop"]
        assert [event["stop_reason"] for event in events] == [None] * (len(events) - 1) + [stop]
        assert len(events) <= NUM_TOKENS
    roomy.check_empty()


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": [5, 500, 6]}, "prompt", "token id 500: the model's vocabulary has ids from 0 to 499"),
        ({"prompt": ""}, "prompt", "an empty prompt: it needs at least one token"),
        ({"prompt": "\ud800"}, "prompt", "a lone surrogate at character 0"),
        ({"prompt": ["a", "b\udfff"]}, "prompt.1", "a lone surrogate at character 1"),
        ({"prompt": "a", "stop": "\ud800"}, "stop", "unable to parse raw data as a unicode string"),
        (
            {"prompt": [5] * 250, "max_tokens": 7},
            "max_tokens",
            "prompt of 250 tokens + output of up to 7 exceeds the model's context of 256 tokens",
        ),
    ],
)
def test_a_prompt_that_the_model_cannot_take(
    roomy: RunningServer, body: dict[str, Any], param: str, message: str
) -> None:
    reply = roomy.post(body)
    assert reply.status == 400
    assert message in reply.error["message"]
    assert reply.error["param"] == param


@pytest.mark.parametrize(("content", "place"), [("\ud800", ""), ([{"type": "text", "text": "\ud800"}], ".0.text")])
def test_a_chat_with_a_lone_surrogate(roomy: RunningServer, content: Any, place: str) -> None:
    reply = roomy.post({"messages": [{"role": "user", "content": content}]}, "/v1/chat/completions")
    assert reply.status == 400
    assert "a lone surrogate at character 0" in reply.error["message"]
    assert reply.error["param"] == f"messages.0.content{place}"


def test_a_chat_that_the_template_does_not_take(roomy: RunningServer) -> None:
    reply = roomy.post({"messages": [{"role": "nobody", "content": "w1"}]}, "/v1/chat/completions")
    assert reply.status == 400
    assert "does not take these messages: unknown role nobody" in reply.error["message"]

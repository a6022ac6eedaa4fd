"""Log probabilities over HTTP equal those of transformers, in OpenAI's and vLLM's forms, also after preemption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("uvicorn")

from support.parameters import TOLERANCE, PlainModel  # noqa: E402
from support.real_models import served  # noqa: E402
from support.servers import DONE, RunningServer, running, simulated  # noqa: E402
from support.tokenizers import of_bytes  # noqa: E402
from support.tokens import CHUNK, TINY_POOL, save_model  # noqa: E402

NEW = 6
TEXT = "hello Käfer, naïve 😀 東京"
NO_SPECIAL_TOKENS = {"logit_bias": {"0": -100, "1": -100, "2": -100}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with the vocabulary of its byte-level tokenizer."""
    path: Path = tmp_path_factory.mktemp("scored")
    tokenizer = of_bytes()
    tokenizer.save_pretrained(path)
    save_model("llama", path, 2, vocab_size=len(tokenizer))
    return path


@pytest.fixture(scope="module")
def model(directory: Path) -> PlainModel:
    return PlainModel(directory)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def roomy(directory: Path) -> Iterator[RunningServer]:
    with running(served(directory, "fastserve", {}, 100)) as server:
        yield server


def prompt_lists(count: int = 8) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 50, (count,), generator=generator).tolist()
    prompts: list[list[int]] = [torch.randint(5, 300, (length,), generator=generator).tolist() for length in lengths]
    return prompts


def ask(server: RunningServer, path: str = "/v1/completions", **body: Any) -> Any:
    reply = server.post(
        {"max_tokens": NEW, "temperature": 0, "ignore_eos": True, "return_token_ids": True} | body, path
    )
    assert reply.status == 200, reply.content
    return reply.json


def chat(server: RunningServer, **body: Any) -> Any:
    return ask(server, "/v1/chat/completions", messages=[{"role": "user", "content": TEXT}], **body)


def check_columns(
    model: PlainModel, columns: dict[str, list[Any]], tokens: list[int], first: int, num_top: int
) -> None:
    """Check that a completion's `logprobs` are those of `tokens` from position `first` on."""
    expected = model.logprobs(tokens)
    assert {len(column) for column in columns.values()} == {len(tokens) - first}
    for place, told, top in zip(
        range(first, len(tokens)), columns["token_logprobs"], columns["top_logprobs"], strict=True
    ):
        if not place:
            assert told is top is None
            continue
        row = expected[place - 1]
        assert abs(told - row[tokens[place]].item()) < TOLERANCE
        likeliest = row.topk(num_top).values.tolist()
        own_is_one = row[tokens[place]] >= row.topk(max(num_top, 1)).values[-1] if num_top else False
        assert len(top) == num_top + (not own_is_one)
        assert sorted(top.values(), reverse=True)[:num_top] == pytest.approx(likeliest, abs=TOLERANCE)
        # lm-eval decides in this way whether a token was the likeliest.
        if num_top:
            assert (told == max(top.values())) == (int(row.argmax()) == tokens[place])


def test_a_completion(roomy: RunningServer, model: PlainModel, tokenizer: Any) -> None:
    prompt = tokenizer.encode(TEXT)
    for num_top in (0, 1, 5):
        (choice,) = ask(roomy, prompt=prompt, logprobs=num_top)["choices"]
        check_columns(model, choice["logprobs"], prompt + choice["token_ids"], len(prompt), num_top)
        told = choice["logprobs"]
        assert told["tokens"] == [roomy.server.engine.model.codec.token_text(token) for token in choice["token_ids"]]
        assert len(set(told["tokens"])) == len(set(choice["token_ids"]))
        assert told["text_offset"][0] == 0
        assert told["text_offset"] == sorted(told["text_offset"])
    assert ask(roomy, prompt=prompt)["choices"][0]["logprobs"] is None


def test_offsets_are_positions_in_the_text(roomy: RunningServer, tokenizer: Any) -> None:
    letters = [token for token in range(3, len(tokenizer)) if tokenizer.decode([token]).isascii()]
    for echo in (False, True):
        (choice,) = ask(roomy, prompt="hello world", allowed_token_ids=letters, logprobs=0, echo=echo)["choices"]
        told = choice["logprobs"]
        for text, offset in zip(told["tokens"], told["text_offset"], strict=True):
            assert choice["text"].startswith(text, offset)
        assert "".join(told["tokens"]) == choice["text"]


def test_an_echo_has_the_prompts_log_probabilities(roomy: RunningServer, model: PlainModel, tokenizer: Any) -> None:
    prompt = tokenizer.encode(TEXT)
    plain = ask(roomy, prompt=TEXT)
    answer = ask(roomy, prompt=TEXT, echo=True, logprobs=2)
    (choice,) = answer["choices"]
    assert choice["text"] == TEXT + plain["choices"][0]["text"]
    assert choice["token_ids"] == prompt + plain["choices"][0]["token_ids"]
    check_columns(model, choice["logprobs"], choice["token_ids"], 0, 2)
    assert answer["usage"] == plain["usage"]
    # For token ids the echo is the decoded text.
    assert ask(roomy, prompt=prompt, echo=True)["choices"][0]["text"] == choice["text"]


def test_an_echo_of_the_prompt_alone(roomy: RunningServer, model: PlainModel, tokenizer: Any) -> None:
    prompt = tokenizer.encode(TEXT)
    answer = ask(roomy, prompt=prompt, echo=True, logprobs=1, max_tokens=0)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["token_ids"], choice["finish_reason"]) == (TEXT, prompt, "length")
    check_columns(model, choice["logprobs"], prompt, 0, 1)
    assert answer["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 0, "total_tokens": len(prompt)}
    reply = roomy.post({"prompt": prompt, "max_tokens": 0})
    assert (reply.status, reply.error["param"]) == (400, "max_tokens")


def test_a_stream_has_the_same_log_probabilities(roomy: RunningServer, tokenizer: Any) -> None:
    body = {"max_tokens": NEW, "temperature": 0, "ignore_eos": True, "prompt": TEXT, "echo": True, "logprobs": 3}
    whole = ask(roomy, **body)["choices"][0]
    streamed: dict[str, list[Any]] = {name: [] for name in whole["logprobs"]}
    text = ""
    for event in roomy.stream(**body):
        if event != DONE:
            (choice,) = event["choices"]
            text += choice["text"]
            for name, column in choice["logprobs"].items():
                streamed[name] += column
    assert text == whole["text"]
    assert streamed == whole["logprobs"]


def test_a_chat(roomy: RunningServer, model: PlainModel, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": TEXT}]
    prompt = tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    answer = chat(roomy, logprobs=True, top_logprobs=4, max_tokens=16, **NO_SPECIAL_TOKENS)
    (choice,) = answer["choices"]
    tokens, content = prompt + choice["token_ids"], choice["logprobs"]["content"]
    expected = model.logprobs(tokens)
    for place, one in enumerate(content, len(prompt)):
        row = expected[place - 1]
        assert one["logprob"] == pytest.approx(row[tokens[place]].item(), abs=TOLERANCE)
        assert [each["logprob"] for each in one["top_logprobs"]] == pytest.approx(
            row.topk(4).values.tolist(), abs=TOLERANCE
        )
        assert [each["token"] for each in one["top_logprobs"]] == [
            roomy.server.engine.model.codec.token_text(token) for token in row.topk(4).indices.tolist()
        ]
    text = bytes(byte for one in content for byte in one["bytes"]).decode(errors="replace")
    assert text == tokenizer.decode(choice["token_ids"])
    assert choice["message"]["content"] == text
    # Without alternatives; streamed.
    (choice,) = chat(roomy, logprobs=True)["choices"]
    assert [one["top_logprobs"] for one in choice["logprobs"]["content"]] == [[]] * NEW
    events = list(
        roomy.stream(
            "/v1/chat/completions", messages=messages, logprobs=True, max_tokens=NEW, temperature=0, ignore_eos=True
        )
    )
    streamed = [event["choices"][0]["logprobs"] for event in events if event != DONE]
    assert [one for told in streamed if told is not None for one in told["content"]] == choice["logprobs"]["content"]


def check_prompt(model: PlainModel, prompt: list[int], told: list[Any], num_top: int) -> None:
    expected = model.logprobs(prompt)
    assert told[0] is None
    assert len(told) == len(prompt)
    for place, one in enumerate(told[1:], 1):
        row = expected[place - 1]
        likeliest = row.topk(num_top).indices.tolist()
        assert set(one) == {str(token) for token in (prompt[place], *likeliest)}
        for token, about in one.items():
            assert about["logprob"] == pytest.approx(row[int(token)].item(), abs=TOLERANCE)
            assert about["rank"] == int((row > row[int(token)]).sum()) + 1
            assert isinstance(about["decoded_token"], str)


def test_prompt_logprobs(roomy: RunningServer, model: PlainModel, tokenizer: Any) -> None:
    prompts = prompt_lists(3)
    answer = ask(roomy, prompt=prompts, prompt_logprobs=2)
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        check_prompt(model, prompt, choice["prompt_logprobs"], 2)
        assert choice["logprobs"] is None
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": TEXT}], tokenize=False, add_generation_prompt=True
    )
    answer = chat(roomy, prompt_logprobs=0)
    check_prompt(model, tokenizer.encode(text), answer["prompt_logprobs"], 0)
    assert "prompt_logprobs" not in chat(roomy)
    reply = roomy.post({"prompt": prompts[0], "prompt_logprobs": 1, "stream": True})
    assert (reply.status, reply.error["param"]) == (400, "prompt_logprobs")


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("fastserve", {"swap": "proactive"}),
        ("fastserve", {"swap": "recompute"}),
        ("vllm-chunked", {"chunk_tokens": CHUNK}),
    ],
)
def test_log_probabilities_survive_preemption(
    directory: Path, model: PlainModel, policy: str, options: dict[str, Any]
) -> None:
    prompts = prompt_lists()
    with running(served(directory, policy, options, TINY_POOL)) as server:
        answer = ask(server, prompt=prompts, echo=True, logprobs=2, prompt_logprobs=1, max_tokens=24)
        server.check_empty()
        jobs = server.watcher.jobs.values()
        assert sum(job.preemptions for job in jobs) > 0
        if policy == "vllm-chunked" or options.get("swap") == "recompute":
            assert sum(job.recomputed_tokens for job in jobs) > 0
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        assert choice["token_ids"][: len(prompt)] == prompt
        check_columns(model, choice["logprobs"], choice["token_ids"], 0, 2)
        check_prompt(model, prompt, choice["prompt_logprobs"], 1)


def test_a_long_prompt_is_scored_in_parts(
    roomy: RunningServer, model: PlainModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastserve.runtime.worker import scoring

    sizes = []
    real = scoring.Scorer._score

    def score(scorer: Any, logits: Any, *arguments: Any) -> None:
        sizes.append(logits.numel())
        real(scorer, logits, *arguments)

    monkeypatch.setattr(scoring, "_MOST_LOGITS", 5000)
    monkeypatch.setattr(scoring.Scorer, "_score", score)
    prompt = [5 + i % 300 for i in range(200)]
    (choice,) = ask(roomy, prompt=prompt, prompt_logprobs=1)["choices"]
    check_prompt(model, prompt, choice["prompt_logprobs"], 1)
    assert len(sizes) > 10
    assert max(sizes) <= 5000


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": [5], "logprobs": 21}, "logprobs"),
        ("/v1/completions", {"prompt": [5], "logprobs": -1}, "logprobs"),
        ("/v1/completions", {"prompt": [5], "prompt_logprobs": 21}, "prompt_logprobs"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_invalid_requests_for_log_probabilities(
    roomy: RunningServer, path: str, body: dict[str, Any], param: str
) -> None:
    reply = roomy.post(body, path)
    assert (reply.status, reply.error["param"]) == (400, param)


def test_the_log_probabilities_of_prompts_are_bounded(roomy: RunningServer) -> None:
    prompt = [5] * 200
    for asked in ({"prompt_logprobs": 20}, {"logprobs": 20, "echo": True}):
        reply = roomy.post({"prompt": [prompt] * 32, "max_tokens": 1, **asked})
        assert (reply.status, reply.error["param"]) == (400, next(iter(asked)))
        assert "134400 log probabilities of prompt tokens in one answer are more than 131072" in reply.error["message"]


def test_a_simulation_refuses_log_probabilities() -> None:
    with running(simulated) as server:
        for body in ({"logprobs": 0}, {"prompt_logprobs": 0}, {"echo": True, "logprobs": 1}):
            reply = server.post({"prompt": [1, 2]} | body)
            assert reply.status == 400
            assert reply.error["message"] == (
                "logprobs and prompt_logprobs need a model, and a simulation has none; leave them out"
            )
        # It can echo.
        assert server.post({"prompt": [1, 2], "echo": True, "max_tokens": 2}).json["choices"][0]["text"] == " 1 2 0 1"

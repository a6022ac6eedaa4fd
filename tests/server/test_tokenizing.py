"""/tokenize and /detokenize: the tokens that a completion or a chat would have, in vLLM's form."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("transformers")

from fastserve.server.options import ServerOptions
from support.servers import RunningServer, running, simulated
from support.tokenizers import of_bytes

MESSAGES = [{"role": "user", "content": "naïve"}, {"role": "assistant", "content": [{"type": "text", "text": "hi"}]}]
TEXT = "hello 東京 👍🏽"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return of_bytes()


@pytest.fixture(scope="module")
def server(tokenizer: Any) -> Iterator[RunningServer]:
    with running(partial(simulated, tokenizer=tokenizer)) as server:
        yield server


def tokenize(server: RunningServer, **body: Any) -> Any:
    reply = server.post(body, "/tokenize")
    assert reply.status == 200
    return reply.json


def test_tokenize_and_detokenize_a_text(server: RunningServer, tokenizer: Any) -> None:
    answer = tokenize(server, model="quick", prompt=TEXT)
    assert answer == {
        "count": len(answer["tokens"]),
        "max_model_len": 65_537,
        "tokens": tokenizer.encode(TEXT),
        "token_strs": None,
    }
    back = server.post({"tokens": answer["tokens"]}, "/detokenize")
    assert back.json == {"prompt": TEXT}
    usage = server.post({"prompt": TEXT, "max_tokens": 1}).json["usage"]
    assert usage["prompt_tokens"] == answer["count"]


def test_special_tokens_are_added_by_default_and_decoded(server: RunningServer, tokenizer: Any) -> None:
    plain = tokenizer.encode("a b", add_special_tokens=False)
    assert tokenize(server, prompt="a b", add_special_tokens=False)["tokens"] == plain
    assert tokenize(server, prompt="a b")["tokens"] == tokenizer.encode("a b")
    assert server.post({"tokens": [1, *plain]}, "/detokenize").json["prompt"].startswith("<s>")


def test_a_conversation_has_the_tokens_of_a_chat(server: RunningServer, tokenizer: Any) -> None:
    answer = tokenize(server, messages=MESSAGES)
    text = "user naïve\nassistant hi\n"
    assert answer["tokens"] == tokenizer.encode(f"{text}assistant", add_special_tokens=False)
    usage = server.post({"messages": MESSAGES, "max_tokens": 1}, "/v1/chat/completions").json["usage"]
    assert usage["prompt_tokens"] == answer["count"]
    without = tokenize(server, messages=MESSAGES, add_generation_prompt=False)
    assert without["tokens"] == tokenizer.encode(text, add_special_tokens=False)


def test_tokens_as_the_vocabulary_writes_them(server: RunningServer, tokenizer: Any) -> None:
    answer = tokenize(server, prompt=TEXT, return_token_strs=True)
    assert answer["token_strs"] == tokenizer.convert_ids_to_tokens(answer["tokens"])


def test_an_empty_text_has_no_tokens(server: RunningServer) -> None:
    assert tokenize(server, prompt="", add_special_tokens=False)["tokens"] == []
    assert server.post({"tokens": []}, "/detokenize").json == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "prompt"),
        ("/tokenize", {"prompt": [1]}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": [{"role": "pilot", "content": "a"}]}, 400, "messages"),
        ("/tokenize", {"messages": MESSAGES, "continue_final_message": True}, 400, "continue_final_message"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "x"}, 400, "chat_template"),
        ("/tokenize", {"prompt": "a", "model": "gpt"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "abc"}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": [1], "model": "gpt"}, 404, "model"),
    ],
)
def test_invalid_requests(server: RunningServer, path: str, body: Any, status: int, param: str) -> None:
    reply = server.post(body, path)
    assert (reply.status, reply.error["param"]) == (status, param)


def test_without_a_tokenizer_both_are_refused(quick: RunningServer) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/tokenize", {"messages": MESSAGES})):
        assert "needs a tokenizer and this server has none" in quick.post(body, path).error["message"]
    reply = quick.post({"tokens": [1]}, "/detokenize")
    assert (reply.status, reply.error["param"]) == (400, "tokens")
    assert "needs a tokenizer and this server has none" in reply.error["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/reset_prefix_cache"])
def test_both_require_the_key(path: str) -> None:
    with running(simulated, ServerOptions(api_key="key")) as server:
        assert server.post({"prompt": "a"}, path).status == 401
        assert server.post({"prompt": "a"}, path, {"Authorization": "Bearer key"}).status == 400


def test_there_is_no_prefix_cache_to_reset(quick: RunningServer) -> None:
    reply = quick.ask("POST", "/reset_prefix_cache")
    assert (reply.status, reply.error["code"]) == (400, "no_prefix_cache")
    assert reply.error["message"] == "this server has no prefix cache, so there is nothing to reset"

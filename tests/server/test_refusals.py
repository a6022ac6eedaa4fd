"""Refusals are clear: a status, and OpenAI's error that names the fault."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")

from fastserve.server.options import ServerOptions
from fastserve.server.protocol.chat import ChatCompletionRequest, ChatMessage
from fastserve.server.protocol.completion import CompletionRequest
from fastserve.server.protocol.generation import GenerationRequest, StreamOptions
from support.servers import Reply, RunningServer, running, simulated

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "a"}]


@pytest.fixture(autouse=True)
def _goes_on(quick: RunningServer) -> Iterator[None]:
    """After each refusal the server still serves, and nothing is left of the request."""
    yield
    assert quick.post({"prompt": [1], "max_tokens": 1}).status == 200
    quick.check_empty()


def refused(reply: Reply, status: int, param: str | None, *says: str) -> dict[str, Any]:
    assert reply.status == status
    error = reply.error
    assert error["param"] == param
    for words in says:
        assert words in error["message"]
    assert error["type"] == {401: "authentication_error", 404: "not_found_error"}.get(status, "invalid_request_error")
    return error


MODELS: dict[str, type[GenerationRequest]] = {TEXT: CompletionRequest, CHAT: ChatCompletionRequest}
OF_ANY: dict[str, list[Any]] = {
    "use_beam_search": [True],
    "length_penalty": [0.5],
    "response_format": [{"type": "json_object"}, {}, {"type": "text", "more": 1}],
    "structured_outputs": [{"json": {}}, {}],
    "guided_json": [{}, "{}"],
    "guided_regex": ["a+", ""],
    "guided_choice": [["a", "b"]],
    "guided_grammar": ["root ::= a"],
    "guided_decoding_backend": ["xgrammar"],
    "bad_words": [["a"]],
    "skip_special_tokens": [False],
    "spaces_between_special_tokens": [False],
    "priority": [-1],
    "kv_transfer_params": [{}],
    "typical_p": [0.9, float("nan")],
}
"""Unsupported fields with values that are not neutral."""
OF_TEXT: dict[str, list[Any]] = OF_ANY | {"best_of": [2, 0], "suffix": ["x"], "prompt_embeds": ["AAAA"]}
OF_CHAT: dict[str, list[Any]] = OF_ANY | {
    "tools": [[{"type": "function", "function": {"name": "f"}}]],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}, float("nan")],
    "functions": [[{"name": "f"}]],
    "continue_final_message": [True],
    "add_generation_prompt": [False],
    "chat_template": ["{{ messages }}", ""],
    "chat_template_kwargs": [{"enable_thinking": False}],
    "reasoning_effort": ["low", "none"],
    "audio": [{"voice": "alloy", "format": "wav"}],
    "modalities": [["text", "audio"], []],
    "prediction": [{"type": "content", "content": "a"}],
}
NOTHING_KNOWN = ["no such value"]


def least(path: str) -> dict[str, Any]:
    return {"prompt": [1], "max_tokens": 1} if path == TEXT else {"messages": MESSAGES, "max_tokens": 1}


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        (path, name, value)
        for path, fields in ((TEXT, OF_TEXT), (CHAT, OF_CHAT))
        for name, values in fields.items()
        for value in values
    ],
)
def test_unsupported_fields_are_refused(quick: RunningServer, path: str, name: str, value: Any) -> None:
    for stream in (False, True):
        reply = quick.post({**least(path), name: value, "stream": stream}, path)
        refused(reply, 400, name, f"{name}: ", " is not supported by this server; leave it out")


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, model in MODELS.items() for name in model.NEUTRAL])
def test_every_field_of_the_table_is_refused_unless_neutral(quick: RunningServer, path: str, name: str) -> None:
    refused(quick.post({**least(path), name: NOTHING_KNOWN}, path), 400, name, "['no such value'] is not supported")
    for neutral in (None, *MODELS[path].NEUTRAL[name]):
        reply = quick.post({**least(path), name: neutral}, path)
        if path == TEXT:
            assert reply.status == 200
        else:
            refused(reply, 400, "messages", "a chat needs a tokenizer and this server has none")


@pytest.mark.parametrize("name", ChatMessage.NEUTRAL)
def test_unsupported_fields_of_a_message_are_refused_unless_neutral(quick: RunningServer, name: str) -> None:
    def messages(value: Any) -> list[dict[str, Any]]:
        return [*MESSAGES, {"role": "assistant", "content": "a", name: value}]

    refused(quick.post({"messages": messages(NOTHING_KNOWN)}, CHAT), 400, f"messages.1.{name}", "not supported")
    for neutral in (None, *ChatMessage.NEUTRAL[name]):
        refused(quick.post({"messages": messages(neutral)}, CHAT), 400, "messages", "needs a tokenizer")


@pytest.mark.parametrize(
    ("name", "value", "shown", "instead"),
    [
        ("guided_regex", "a+", "'a+'", ""),
        ("skip_special_tokens", False, "false", " or send true"),
        ("response_format", {}, "{}", ' or send {"type": "text"}'),
    ],
)
def test_a_refusal_is_one_sentence(quick: RunningServer, name: str, value: Any, shown: str, instead: str) -> None:
    message = quick.post({"prompt": [1], name: value}).error["message"]
    assert message == f"{name}: {shown} is not supported by this server; leave it out{instead}"


def test_the_docs_name_every_field() -> None:
    text = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    section = text.partition("## What a request may ask")[2].partition("\n## ")[0]
    before, _, after = section.partition("Refused with 400")
    supported, refused_ones = (set(re.findall(r"`(\w+)`", part)) for part in (before, after.partition("All other")[0]))
    parts = [*MODELS.values(), ChatMessage, StreamOptions]
    assert {name for part in parts for name in part.model_fields} <= supported
    assert {name for part in parts for name in part.NEUTRAL} == refused_ones


def test_unknown_fields_are_ignored(quick: RunningServer) -> None:
    more = {"user": "someone", "unknown": [1], "metadata": {"a": "b"}, "store": False, "cache_salt": "x"}
    assert quick.post({**least(TEXT), **more}).status == 200


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"prompt": None}, "prompt", "Field required"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [[]]}, "prompt.0", "at least 1 item"),
        ({"prompt": [[1], []]}, "prompt.1", "at least 1 item"),
        ({"prompt": 5}, "prompt", "a text, a list of token ids, or a list of either, got 5"),
        ({"prompt": {"a": 1}}, "prompt", "a text, a list of token ids, or a list of either"),
        ({"prompt": [-1]}, "prompt.0", "greater than or equal to 0"),
        ({"prompt": [2**31]}, "prompt.0", "less than or equal to 2147483647"),
        ({"prompt": [1, "a"]}, "prompt.1", "valid integer"),
        ({"prompt": [1.5]}, "prompt.0", "valid integer"),
        ({"prompt": [float("nan")]}, "prompt.0", "finite"),
        ({"prompt": "text"}, "prompt", "needs a tokenizer and this server has none; give token ids"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens: Input should be greater than or equal to 1, got 0"),
        ({"max_tokens": "many"}, "max_tokens", "valid integer"),
        ({"max_tokens": 10**30}, "max_tokens", "less than or equal to 2147483647"),
        ({"max_tokens": float("inf")}, "max_tokens", "finite"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"seed": 2**63}, "seed", "9223372036854775807"),
        ({"seed": "x"}, "seed", "valid integer"),
        ({"stop": 5}, "stop", "a text or a list of texts, got 5"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": "a"}, "stop", "needs a tokenizer and this server has none; use stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0", "greater than or equal to 0"),
        ({"stream": "maybe"}, "stream", "valid boolean"),
        ({"stream": True, "stream_options": 5}, "stream_options", "a JSON object"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "for stream: true only"),
        ({"model": 5}, "model", "valid string"),
    ],
)
def test_invalid_values(quick: RunningServer, changes: dict[str, Any], param: str | None, says: str) -> None:
    refused(quick.post({"prompt": [1]} | changes), 400, param, says)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("a", "messages"),
        ([5], "messages.0"),
        ([{}], "messages.0.role"),
        ([{"role": 5}], "messages.0.role"),
        ([*MESSAGES, {"role": "user", "content": 5}], "messages.1.content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages.0.content.0.type"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}], "messages.0.content.1"),
    ],
)
def test_invalid_messages(quick: RunningServer, messages: Any, param: str) -> None:
    refused(quick.post({"messages": messages}, CHAT), 400, param)


def test_a_request_that_never_fits_is_refused_with_the_numbers(quick: RunningServer) -> None:
    most = quick.get("/v1/models").json["data"][0]["max_model_len"]
    assert most == 65_537
    error = refused(quick.post({"prompt": [1] * 9, "max_tokens": most - 8}), 400, "max_tokens")
    assert error["message"] == (
        "This model's maximum context length is 65537 tokens: "
        "prompt of 9 tokens + output of up to 65529 needs 4097 cache blocks of 16 tokens, the GPU pool has 4096; "
        "raise num_gpu_blocks or shorten the request"
    )
    assert error["code"] == "context_length_exceeded"
    stream = quick.stream(prompt=[1] * 9, max_tokens=most - 9, return_token_ids=True)
    assert stream.tokens(3) == [0, 1, 2]
    stream.close()


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_a_model_that_is_not_served(quick: RunningServer, path: str) -> None:
    reply = quick.post({"model": "\ud800", "prompt": [1], "messages": MESSAGES}, path)
    error = refused(reply, 404, "model", "is not served here; this server has 'quick'")
    assert error["code"] == "model_not_found"
    refused(quick.get("/v1/models/a/b"), 404, "model", "model 'a/b' is not served here")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"prompt": [1]', "the body is not JSON: Expecting ',' delimiter at character 14"),
        (b"", "the body must be a JSON object, sent with 'Content-Type: application/json'"),
        (b"[]", "the body must be a JSON object"),
        (b"5", "the body must be a JSON object"),
        (b'"text"', "the body must be a JSON object"),
        (b"null", "the body must be a JSON object"),
        (b'{"prompt": "\xff"}', "the body is not UTF-8: byte 0xff at 12"),
        (b"[" * 16_000, "nested too deeply"),
        (b"[" * 100_000, "the body has more than 16384 lists and objects; send less in one request"),
        (b'{"prompt": [1], "seed": ' + b"9" * 5000 + b"}", "a number of 5000 digits; no field needs more than 100"),
        (b'{"prompt": [1], "seed": 1, "seed": 2}', "the body has the field 'seed' twice; send it once"),
        (b'{"prompt": [1], "a": [{"b": {}, "c": {}, "b": {}}]}', "the body has the field 'b' twice"),
        (b'{"prompt": [1]} {}', "the body is not JSON: Extra data at character 16"),
        ('{"prompt": [1]}'.encode("utf-16"), "the body is not UTF-8: byte 0xff at 0"),
        ('{"prompt": [1]}'.encode("utf-16-le"), "the body is not JSON"),
        (b'{"prompt": [1], "max_tokens": 1e999}', "finite"),
    ],
)
def test_invalid_bodies(quick: RunningServer, content: bytes, says: str) -> None:
    reply = quick.post(content)
    assert reply.status == 400
    assert says in reply.error["message"]


@pytest.mark.parametrize("depth", range(50, 1000, 50))
def test_deeply_nested_bodies(quick: RunningServer, depth: int) -> None:
    deep = '{"a":' * depth + "1" + "}" * depth
    reply = quick.post(f'{{"messages": {json.dumps(MESSAGES)}, "response_format": {deep}}}'.encode(), CHAT)
    assert reply.status == 400
    assert reply.error["param"] == "response_format"
    assert len(reply.error["message"]) < 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_a_body_of_another_content_type(quick: RunningServer, kind: str) -> None:
    reply = quick.post({"prompt": [1]}, headers={"Content-Type": kind})
    refused(reply, 400, None, "the body must be a JSON object, sent with 'Content-Type: application/json'")


@pytest.mark.parametrize("encoding", ["gzip", "br"])
def test_a_compressed_body(quick: RunningServer, encoding: str) -> None:
    reply = quick.post(b"\x1f\x8b", headers={"Content-Encoding": encoding})
    refused(reply, 400, None, f"Content-Encoding '{encoding}' is not supported; send the body uncompressed")


def test_a_byte_order_mark_is_ignored(quick: RunningServer) -> None:
    assert quick.post(b"\xef\xbb\xbf" + b'{"prompt": [1], "max_tokens": 1}').status == 200


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size_mib", [3, 33])
def test_a_body_that_is_too_large(quick: RunningServer, chunked: bool, size_mib: int) -> None:
    piece = b" " * 2**20
    content = iter([piece] * size_mib) if chunked else piece * size_mib
    headers = {"Content-Type": "application/json"}
    try:
        reply = quick.ask("POST", TEXT, content, headers)
    except (BrokenPipeError, ConnectionResetError):
        pytest.fail("it was not told why")
    refused(reply, 413, None, "the body is larger than 2097184 bytes, which is enough for the model's context")


def test_as_many_prompts_as_the_server_holds_and_no_more() -> None:
    with running(simulated, ServerOptions(max_requests=3)) as server:
        assert server.post({"prompt": [[1]] * 3, "max_tokens": 2}).status == 200
        refused(
            server.post({"prompt": [[1]] * 4}), 400, "prompt", "4 choices in one request; this server takes 3 at most"
        )
        server.check_empty()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", TEXT, 405),
        ("GET", TEXT, 405),
        ("POST", "/v1/models", 405),
        ("DELETE", "/health", 405),
        ("GET", "/v1/embeddings", 404),
        ("POST", "/v1/responses", 404),
        ("GET", "/v1/completions/x", 404),
    ],
)
def test_unknown_paths_and_methods(quick: RunningServer, method: str, path: str, status: int) -> None:
    reply = quick.ask(method, path)
    refused(reply, status, None)
    assert (status == 405) == ("allow" in reply.headers)


# -- keys ------------------------------------------------------------------------------------------------------------

KEY = "ключ 1"
"""The openai package would not send such a key, but a command line may have one."""


@pytest.fixture(scope="module")
def locked() -> Iterator[RunningServer]:
    with running(simulated, ServerOptions(api_key=KEY)) as server:
        yield server


PROTECTED = [
    ("POST", TEXT, b'{"prompt": [1]}'),
    ("POST", CHAT, b"{}"),
    ("GET", "/v1/models", b""),
    ("GET", "/v1/models/quick", b""),
    ("GET", "/page/state", b""),
]


@pytest.mark.parametrize(("method", "path", "content"), PROTECTED)
@pytest.mark.parametrize(
    "given",
    ["", f"Bearer {KEY}x", "Bearer", "Bearer ", KEY, f"Basic {KEY}", f"Bearer{KEY}", "Bearer \xff\xfe"],
)
def test_requests_without_the_key_are_refused(
    locked: RunningServer, method: str, path: str, content: bytes, given: str
) -> None:
    encoded = given.encode("latin-1") if "\xff" in given else given.encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": encoded.decode("latin-1")} if given else {})
    reply = locked.ask(method, path, content, headers)
    error = refused(reply, 401, None, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'")
    assert error["code"] == "invalid_api_key"
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"prompt": "text", "model": "gpt"}', b" " * (33 * 2**20)])
def test_the_key_comes_before_the_body(locked: RunningServer, content: bytes) -> None:
    # The server need not read all of a large body.
    if len(content) < 1000:
        refused(locked.post(content), 401, None)
    else:
        stream = locked.stream(prompt=[1])
        assert stream.response.status == 401
        stream.close()


def test_with_the_key(locked: RunningServer) -> None:
    for scheme in ("Bearer", "bearer"):
        headers = {"Authorization": f"{scheme} {KEY}".encode().decode("latin-1")}
        assert locked.post({"prompt": [1]}, headers=headers).status == 200
        assert locked.get("/page/state", headers).status == 200
        assert locked.get("/v1/models/quick", headers).status == 200


@pytest.mark.parametrize("path", ["/health", "/metrics", "/version", "/", "/openapi.json"])
def test_monitoring_needs_no_key(locked: RunningServer, path: str) -> None:
    assert locked.get(path).status == 200

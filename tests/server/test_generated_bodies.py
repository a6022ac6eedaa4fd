"""Any JSON is answered with 200, or with 4xx and an error in OpenAI's form; never with 500."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.profiles import share

pytest.importorskip("uvicorn")
pytest.importorskip("transformers")

from fastserve.server.protocol.chat import ChatCompletionRequest, ChatMessage
from fastserve.server.protocol.completion import CompletionRequest
from fastserve.server.protocol.generation import GenerationRequest
from support.servers import RunningServer, running, simulated
from support.tokenizers import of_words

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
MODELS: dict[str, type[GenerationRequest]] = {TEXT: CompletionRequest, CHAT: ChatCompletionRequest}
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=6,
)
"""Includes NaN and lone surrogates, which `json` writes and reads although JSON has neither."""
FEW = st.integers(-2, 3)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", "tool", ""]) | ANY,
            "content": st.just("w1 w2") | st.lists(st.just({"type": "text", "text": "w1"}) | ANY, max_size=2) | ANY,
            **dict.fromkeys(ChatMessage.NEUTRAL, ANY),
        },
    )
    | ANY,
    max_size=3,
)
PROMPTS = (
    st.just("w1 w2")
    | st.lists(st.integers(0, 9) | ANY, max_size=3)
    | st.lists(st.lists(FEW, max_size=3), max_size=3)
    | ANY
)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running(partial(simulated, iteration_s=0.00001, max_model_len=48, tokenizer=of_words())) as server:
        yield server
        server.check_empty()
        assert server.failures == []


def bodies(path: str) -> st.SearchStrategy[Any]:
    """Objects with some of the fields that the server knows, mostly of the right kind, and anything else."""
    model = MODELS[path]
    known = [*model.model_fields, *model.NEUTRAL]
    given = st.fixed_dictionaries(
        {"messages": MESSAGES} if path == CHAT else {"prompt": PROMPTS},
        optional={name: FEW | st.booleans() | ANY for name in known if name not in ("messages", "prompt")},
    )
    return given | ANY


@pytest.mark.parametrize("path", MODELS)
def test_any_json_is_served_or_refused_with_an_error(server: RunningServer, path: str) -> None:
    statuses = set()

    @share(0.5)
    @given(bodies(path))
    def check(body: Any) -> None:
        reply = server.post(body, path)
        statuses.add(reply.status)
        if reply.status == 200:
            assert b"choices" in reply.content
            return
        assert reply.status in (400, 404), reply.content
        error = reply.error
        assert 0 < len(error["message"]) < 1000
        assert "\n" not in error["message"]
        assert error["type"] in ("invalid_request_error", "not_found_error")
        if error["param"] is not None and isinstance(body, dict):
            assert error["param"].split(".")[0] in {*body, "prompt", "messages"}, error

    check()
    assert statuses >= {200, 400}

"""Generated requests check /openapi.json: answers have no status and no form but the documented ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

pytest.importorskip("uvicorn")
pytest.importorskip("transformers")
schemathesis = pytest.importorskip("schemathesis")

from schemathesis import GenerationMode, checks  # noqa: E402
from schemathesis.specs.openapi import checks as openapi_checks  # noqa: E402

from fastserve.server.options import ServerOptions  # noqa: E402
from fastserve.server.protocol.chat import ChatCompletionRequest  # noqa: E402
from fastserve.server.protocol.completion import CompletionRequest  # noqa: E402
from support.servers import RunningServer, running, simulated  # noqa: E402
from support.tokenizers import of_words  # noqa: E402

KEY = "secret-1"
SELDOM_SERVED = {"model", "stream_options", *CompletionRequest.NEUTRAL, *ChatCompletionRequest.NEUTRAL}
CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.unsupported_method,
    openapi_checks.ignored_auth,
]


VALID, INVALID = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
EXAMPLES = {
    ("POST", "/v1/completions", VALID): 80,
    ("POST", "/v1/completions", INVALID): 80,
    ("POST", "/v1/chat/completions", VALID): 80,
    ("POST", "/v1/chat/completions", INVALID): 80,
    ("GET", "/v1/models", VALID): 5,
    ("GET", "/v1/models/{name}", VALID): 10,
    ("GET", "/v1/models/{name}", INVALID): 10,
    ("GET", "/health", VALID): 3,
    ("GET", "/ping", VALID): 3,
    ("POST", "/ping", VALID): 3,
    ("GET", "/load", VALID): 3,
    ("POST", "/reset_prefix_cache", VALID): 3,
    ("POST", "/tokenize", VALID): 40,
    ("POST", "/tokenize", INVALID): 40,
    ("POST", "/detokenize", VALID): 40,
    ("POST", "/detokenize", INVALID): 40,
    ("GET", "/version", VALID): 3,
    ("GET", "/metrics", VALID): 3,
}
"""How many requests of each kind. A request without parameters cannot be invalid."""


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    # With such a short context every output ends soon.
    tokenizer = of_words()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}w1"  # For any role.
    build = partial(simulated, iteration_s=0.00001, max_model_len=48, tokenizer=tokenizer)
    with running(build, ServerOptions(api_key=KEY)) as server:
        yield server
        server.check_empty()
        assert server.failures == []


@pytest.fixture(scope="module")
def schema(server: RunningServer) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_all_operations_are_here(schema: Any) -> None:
    found = [operation.ok() for operation in schema.get_all_operations()]
    assert {(operation.method.upper(), operation.path) for operation in found} == {key[:2] for key in EXAMPLES}


@pytest.mark.parametrize(("method", "path", "mode"), EXAMPLES)
def test_every_answer_is_one_that_is_documented(
    server: RunningServer, schema: Any, method: str, path: str, mode: GenerationMode
) -> None:
    @given(schema[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES[method, path, mode],
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    def check(case: Any) -> None:
        if mode is VALID and isinstance(case.body, dict):
            # Other tests cover valid requests that are refused.
            for name in SELDOM_SERVED:
                case.body.pop(name, None)
        case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, checks=CHECKS)

    before = server.watcher.outcomes["finished"]
    check()
    served = server.watcher.outcomes["finished"] - before
    assert served > 10 or not path.endswith("/completions") or mode is INVALID

"""Presets and simulations have text without --tokenizer: the README's two commands with usual clients."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("tokenizers")
openai = pytest.importorskip("openai")

from fastserve.core.config import EngineOptions  # noqa: E402
from fastserve.core.errors import ConfigError  # noqa: E402
from fastserve.core.tokenizer import BuiltinTokenizer  # noqa: E402
from fastserve.server.model import load_served_model  # noqa: E402
from fastserve.server.options import ModelOptions  # noqa: E402
from support.servers import Command, RunningServer, command, running  # noqa: E402

TOKENIZER = BuiltinTokenizer()
SIMULATED = ["--backend", "sim", "--profile", "a100-80g/opt-13b-tp1-swifttransformer"]
PRESET = ["--model", "opt-tiny", "--load-format", "dummy", "--policy", "fastserve-fcfs", "--torch-threads", "1"]
PRESET += ["--set", "num_gpu_blocks=128"]
USER: Any = {"role": "user", "content": "Count for me, please."}
CONTEXT = 2048
"""OPT's."""


@pytest.fixture(scope="module", params=["simulation", "preset"])
def started(request: pytest.FixtureRequest) -> Iterator[tuple[str, Command]]:
    if request.param == "preset":
        pytest.importorskip("torch")
    with command(*(SIMULATED if request.param == "simulation" else PRESET)) as server:
        yield request.param, server


@pytest.fixture(scope="module")
def client(started: tuple[str, Command]) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{started[1].port}/v1", api_key="-", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def name(client: Any) -> str:
    (model,) = client.models.list().data
    assert model.max_model_len == CONTEXT
    model_id: str = model.id
    return model_id


def test_a_text_prompt(client: Any, name: str) -> None:
    completion = client.completions.create(
        model=name, prompt="Once upon a time", max_tokens=20, extra_body={"ignore_eos": True}
    )
    assert completion.usage.prompt_tokens == len(TOKENIZER.encode("Once upon a time"))
    assert completion.usage.completion_tokens == 20
    assert completion.choices[0].text


def test_a_stream_of_a_chat_shows_a_text_for_every_token(client: Any, name: str, started: tuple[str, Command]) -> None:
    stream = client.chat.completions.create(
        model=name, messages=[USER], max_tokens=30, stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )  # fmt: skip
    first, *chunks = [chunk.choices[0] for chunk in stream]
    assert (first.delta.role, first.delta.content) == ("assistant", "")
    texts = [chunk.delta.content for chunk in chunks]
    assert len(texts) == 30
    if started[0] == "simulation":
        assert texts == [f" {number}" for number in range(30)]
    # Some of a preset's random tokens are bytes that alone are no text.
    for chunk, text in zip(chunks, texts, strict=True):
        if chunk.token_ids[0] >= len(TOKENIZER):
            assert text.endswith(f" {chunk.token_ids[0] % 1000}")


def test_a_text_that_stops(client: Any, name: str, started: tuple[str, Command]) -> None:
    ask = {"model": name, "messages": [USER], "max_tokens": 40, "temperature": 0, "extra_body": {"ignore_eos": True}}
    text = client.chat.completions.create(**ask).choices[0].message.content
    stop = " 12" if started[0] == "simulation" else text[40:46]
    (choice,) = client.chat.completions.create(**ask, stop=stop).choices
    assert choice.message.content == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_a_chat_without_a_limit_ends_with_the_models_context(
    client: Any, name: str, started: tuple[str, Command]
) -> None:
    long: Any = {"role": "user", "content": " 0" * 1990}
    completion = client.chat.completions.create(model=name, messages=[long], extra_body={"ignore_eos": True})
    assert completion.usage.total_tokens == CONTEXT
    if started[0] == "simulation":
        text = completion.choices[0].message.content
        assert len(TOKENIZER.encode(text)) == completion.usage.completion_tokens
    with pytest.raises(openai.BadRequestError, match=str(CONTEXT)):
        client.completions.create(model=name, prompt="a", max_tokens=CONTEXT)


def test_a_simulation_may_be_given_another_context() -> None:
    options = EngineOptions(max_model_len=5000)
    model = load_served_model(
        ModelOptions(backend="sim", profile="a100-80g/opt-13b-tp1-swifttransformer", engine=options)
    )
    assert model.engine.longest_request == 5000
    model.close()


def test_without_a_tokenizer_tokens_are_numbers() -> None:
    def build() -> Any:
        return load_served_model(
            ModelOptions(backend="sim", profile="a100-80g/opt-13b-tp1-swifttransformer", tokenizer="none")
        )

    with running(build) as server:
        answer = server.post({"prompt": [1], "max_tokens": 5, "return_token_ids": True}).json
        assert answer["choices"][0]["token_ids"] == list(range(5))
        assert refusal(server, {"prompt": "text"}) == (
            "a text prompt needs a tokenizer and this server has none; give token ids, or start it with --tokenizer "
            "builtin or a directory"
        )


def refusal(server: RunningServer, body: dict[str, Any]) -> str:
    reply = server.post(body)
    assert reply.status == 400
    message: str = reply.error["message"]
    return message


def test_a_tokenizer_whose_tokens_cannot_be_counted_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    nothing = Tokenizer(models.WordLevel({"<unk>": 0, "a b": 1}, unk_token="<unk>"))
    nothing.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=nothing, unk_token="<unk>").save_pretrained(tmp_path)
    options = ModelOptions(backend="sim", profile="a100-80g/opt-13b-tp1-swifttransformer", tokenizer=str(tmp_path))
    with pytest.raises(ConfigError, match=r"no tokens whose text is one token again.*another --tokenizer, or builtin"):
        load_served_model(options)


def test_a_simulated_server_imports_no_torch() -> None:
    code = (
        "import sys; from fastserve.server.model import load_served_model\n"
        "from fastserve.server.options import ModelOptions\n"
        "from fastserve.server.serve import serve\n"
        "model = load_served_model(ModelOptions(backend='sim', profile='a100-80g/opt-13b-tp1-swifttransformer'))\n"
        "tokens = model.codec.encode_chat([{'role': 'user', 'content': 'a'}])\n"
        "model.codec.decoder(tokens, ['b']).add(0); model.close(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_fastbench_sends_it_text_prompts(tmp_path: Path) -> None:
    from harness.run.config import RunConfig
    from harness.run.runner import run

    def build() -> Any:
        return load_served_model(ModelOptions(backend="sim", profile="a100-80g/opt-13b-tp1-swifttransformer"))

    with running(build) as server:
        config = RunConfig(
            backend="http", url=server.url, prompts="text", tokenizer="builtin",
            trace="fixed:prompt=40,output=5", rate=50.0, num_requests=8,
        )  # fmt: skip
        summary = run(config, tmp_path / "out")
    assert (summary["finished"], summary["failed"]) == (8, 0)

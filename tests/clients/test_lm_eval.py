"""lm-eval scores a model over HTTP unchanged: its log likelihoods equal those of transformers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("uvicorn")

from support.clients import command_of
from support.parameters import TOLERANCE, PlainModel
from support.servers import LONG_S, Command
from support.tokenizers import of_bytes
from support.tokens import save_model

QUESTIONS = [
    {"question": "hello world", "choices": ["hello", "über die Straße", "naïve café"], "answer": 1},
    {"question": "Ein Käfer läuft", "choices": ["東京へ", "😀👍🏽"], "answer": 0},
    {"question": "Привет, мир!", "choices": ["a", "b", "c", "d"], "answer": 3},
    {"question": "hello " * 20, "choices": ["world", "hello"], "answer": 0},
]
CHOICES = """
task: own_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: own_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
GENERATED = """
task: own_generated
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("tiny")
    tokenizer = of_bytes()
    tokenizer.save_pretrained(path)
    save_model("llama", path, 2, vocab_size=len(tokenizer), max_model_len=512)
    return path


@pytest.fixture(scope="module")
def samples(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Return lm-eval's log of each task."""
    lm_eval = command_of("lm_eval")
    work = tmp_path_factory.mktemp("lm_eval")
    data = work / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS), encoding="utf-8")
    for task in (CHOICES, ROLLING, GENERATED):
        text = task.format(data=data)
        (work / f"{text.split()[1]}.yaml").write_text(text, encoding="utf-8")
    # A pool too small for the requests that it sends at the same time.
    pools = ["--set", "num_gpu_blocks=24", "--set", "num_host_blocks=64", "--set", "max_batch_size=4"]
    server = Command(
        "--model", str(directory), "--served-model-name", "tiny", "--no-page", *pools, lifetime_s=6 * LONG_S
    )
    try:
        arguments = (
            f"model=tiny,base_url=http://127.0.0.1:{server.port}/v1/completions,tokenizer={directory},"
            "tokenizer_backend=huggingface,num_concurrent=4,max_length=512,max_retries=1"
        )
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "home")}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            [
                lm_eval, "run", "--model", "local-completions", "--model_args", arguments,
                "--tasks", "own_choices,own_rolling,own_generated", "--include_path", work,
                "--output_path", work / "out", "--log_samples",
            ],
            env=environment, capture_output=True, text=True, timeout=5 * LONG_S, check=False, cwd=work,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        found = {}
        for path in (work / "out").rglob("samples_*.jsonl"):
            name = path.name.removeprefix("samples_").rsplit("_", 1)[0]
            found[name] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        yield found
    finally:
        server.signal()
        status, _ = server.end()
    assert status == 0


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(directory: Path) -> PlainModel:
    return PlainModel(directory)


def likelihood(model: PlainModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The sum of the continuation's log probabilities, and whether each of its tokens was the likeliest."""
    tokens = context + continuation
    rows = model.logprobs(tokens)[len(context) - 1 : -1]
    total = sum(row[token].item() for row, token in zip(rows, continuation, strict=True))
    return total, rows.argmax(-1).tolist() == continuation


def test_choices(samples: dict[str, list[dict[str, Any]]], model: PlainModel, tokenizer: Any) -> None:
    assert len(samples["own_choices"]) == len(QUESTIONS)
    for sample in samples["own_choices"]:
        for number, (((told, is_greedy),), choice) in enumerate(
            zip(sample["resps"], sample["doc"]["choices"], strict=True)
        ):
            arguments = sample["arguments"][f"gen_args_{number}"]
            context, continuation = arguments["arg_0"], arguments["arg_1"]
            assert continuation.strip() == choice
            whole = tokenizer.encode(context + continuation, add_special_tokens=False)
            # lm-eval moves spaces at a context's end to the continuation.
            before = tokenizer.encode(context.rstrip(), add_special_tokens=False)
            assert whole[: len(before)] == before
            expected = likelihood(model, before, whole[len(before) :])
            assert float(told) == pytest.approx(expected[0], abs=TOLERANCE)
            assert (str(is_greedy) == "True") == expected[1]


def test_whole_texts(samples: dict[str, list[dict[str, Any]]], model: PlainModel, tokenizer: Any) -> None:
    assert len(samples["own_rolling"]) == len(QUESTIONS)
    for sample in samples["own_rolling"]:
        tokens = tokenizer.encode(sample["doc"]["question"], add_special_tokens=False)
        expected, _ = likelihood(model, [tokenizer.bos_token_id], tokens)
        ((told,),) = sample["resps"]
        assert float(told) == pytest.approx(expected, abs=TOLERANCE)


def test_generated_texts(samples: dict[str, list[dict[str, Any]]], model: PlainModel, tokenizer: Any) -> None:
    from fastserve import SamplingParams

    end = tokenizer.eos_token_id
    for sample in samples["own_generated"]:
        prompt = tokenizer.encode(sample["doc"]["question"], add_special_tokens=False)
        generated = model.generate(prompt, SamplingParams(max_tokens=8), (end,))
        text = tokenizer.decode([token for token in generated if token != end], skip_special_tokens=True)
        ((told,),) = sample["resps"]
        assert told == text.split("\n")[0]

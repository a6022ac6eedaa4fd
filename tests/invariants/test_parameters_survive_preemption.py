"""I6 for what changes a draw and for what is told of it: neither preemption, chunks nor other requests change it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from fastserve import SamplingParams
from fastserve.engine.outputs import RequestOutput
from support.parameters import EOS, NUM_TOKENS, PlainModel, check_equal, generate, params
from support.tokens import CHUNK, TINY_POOL, save_model


@pytest.fixture(scope="module", params=["opt", "llama"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param)
    save_model(request.param, path, 2)
    return path


@pytest.fixture(scope="module")
def roomy(directory: Path) -> list[RequestOutput]:
    """With room for all."""
    return generate(directory, "fastserve-fcfs", {}, num_gpu_blocks=100)


def test_tokens_and_scores_are_those_of_transformers(directory: Path, roomy: list[RequestOutput]) -> None:
    model = PlainModel(directory)
    for output, asked in zip(roomy, params(), strict=True):
        prompt, tokens = output.prompt_token_ids, output.token_ids
        if not asked.temperature:
            assert tokens == model.generate(prompt, asked, EOS)
        assert (output.prompt_logprobs is None) == (asked.prompt_logprobs is None)
        if asked.prompt_logprobs is not None:
            first, *others = output.prompt_logprobs or ()
            assert first is None
            assert len(others) == len(prompt) - 1
            model.check(prompt, 1, [one for one in others if one is not None], asked.prompt_logprobs)
        (completion,) = output.outputs
        assert (completion.logprobs is None) == (asked.logprobs is None)
        if asked.logprobs is not None:
            assert len(completion.logprobs or ()) == len(tokens)
            model.check([*prompt, *tokens], len(prompt), completion.logprobs or (), asked.logprobs)


def test_the_parameters_matter(directory: Path, roomy: list[RequestOutput]) -> None:
    model = PlainModel(directory)
    plain = SamplingParams(max_tokens=NUM_TOKENS)
    changed = [
        output for output in roomy[:5] if output.token_ids != model.generate(output.prompt_token_ids, plain, EOS)
    ]
    assert len(changed) >= 4  # A penalty need not reach the best token.
    # The end is the likeliest as soon as it may come, and comes then.
    assert len(roomy[4].token_ids) == 21
    assert roomy[4].token_ids[-1] in EOS
    assert set(roomy[3].token_ids) <= set(range(40, 60))


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("fastserve", {"swap": "proactive"}),
        ("mlfq", {"swap": "reactive"}),
        ("fastserve", {"swap": "recompute"}),
        ("vllm-chunked", {"chunk_tokens": CHUNK}),
        ("run-to-completion", {}),
    ],
)
def test_nothing_changes_where_cache_is_short(
    directory: Path, roomy: list[RequestOutput], policy: str, options: dict[str, Any]
) -> None:
    outputs = generate(directory, policy, options, num_gpu_blocks=TINY_POOL)
    check_equal(outputs, roomy)
    if options.get("swap") == "recompute" or policy == "vllm-chunked":
        assert sum(output.metrics.recomputed_tokens for output in outputs) > 0

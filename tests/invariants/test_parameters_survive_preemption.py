"""I6 for what changes a draw and for what is told of it: neither preemption, chunks nor other requests change it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from fastserve import LLM, SamplingParams
from fastserve.llm import RequestOutput
from fastserve.options import option_names
from fastserve.scheduler import find_policy
from support.parameters import PlainModel
from support.tokens import CHUNK, IMPATIENT, TINY_POOL, prompts, save_model

EOS = (2, 7, 11)
NUM_TOKENS = 24
ASKED = [
    SamplingParams(repetition_penalty=4.0, logprobs=3),
    SamplingParams(presence_penalty=2.0, frequency_penalty=2.0, prompt_logprobs=2),
    SamplingParams(logit_bias={5: 8.0, 9: -30.0}, frequency_penalty=1.9, logprobs=0, prompt_logprobs=0),
    SamplingParams(allowed_token_ids=range(40, 60), repetition_penalty=1.2, logprobs=5, prompt_logprobs=5),  # type: ignore[arg-type]
    SamplingParams(max_tokens=NUM_TOKENS, min_tokens=20, logit_bias=dict.fromkeys(EOS, 100.0)),
    SamplingParams(prompt_logprobs=1),
    SamplingParams(temperature=0.9, min_p=0.02, repetition_penalty=0.7, seed=5),
    SamplingParams(),
]  # fmt: skip


def params() -> list[SamplingParams]:
    return [replace(one, max_tokens=NUM_TOKENS) for one in ASKED]


@pytest.fixture(scope="module", params=["opt", "llama"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param)
    save_model(request.param, path, 2)
    return path


def generate(directory: Path, policy: str, options: dict[str, Any], **arguments: Any) -> list[RequestOutput]:
    known = option_names(find_policy(policy).Options)
    with LLM(
        directory, policy=policy, profile="a100-80g/opt-13b-tp1", max_batch_size=4, num_host_blocks=100,
        policy_options={name: value for name, value in IMPATIENT.items() if name in known} | options, **arguments,
    ) as llm:  # fmt: skip
        llm.engine.eos_token_ids = EOS
        outputs = llm.generate(prompt_token_ids=prompts(), sampling_params=params())
        llm.engine.kv.check_invariants()
    return outputs


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
    assert [output.token_ids for output in outputs] == [output.token_ids for output in roomy]
    for output, expected in zip(outputs, roomy, strict=True):
        for told, known in (
            (output.prompt_logprobs, expected.prompt_logprobs),
            (output.outputs[0].logprobs, expected.outputs[0].logprobs),
        ):
            assert (told is None) == (known is None)
            for one, other in zip(told or (), known or (), strict=True):
                if one is None or other is None:
                    assert one is other
                    continue
                assert (one.token_id, one.rank) == (other.token_id, other.rank)
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                assert [token for token, _ in one.top] == [token for token, _ in other.top]
    if options.get("swap") == "recompute" or policy == "vllm-chunked":
        assert sum(output.metrics.recomputed_tokens for output in outputs) > 0

"""What sampling parameters and log probabilities mean, once more and plainly, on what transformers computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastserve import LLM, SamplingParams
from fastserve.core.logprobs import TokenLogprobs
from fastserve.core.options import option_names
from fastserve.engine.outputs import RequestOutput
from fastserve.policies.discovery import find_policy
from support.tokens import IMPATIENT, prompts

TOLERANCE = 1e-4
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


class PlainModel:
    """A saved model as transformers runs it, without a cache."""

    def __init__(self, directory: Path) -> None:
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """`[len(tokens), vocab_size]`, float64."""
        logits: torch.Tensor = self._model(torch.tensor([list(tokens)])).logits[0]
        return logits.double()

    def logprobs(self, tokens: Sequence[int]) -> torch.Tensor:
        """`[len(tokens), vocab_size]`: of what follows each token."""
        return self.logits(tokens).log_softmax(-1)

    def generate(self, prompt: Sequence[int], params: SamplingParams, eos_token_ids: Sequence[int]) -> list[int]:
        """Greedy tokens under `params`."""
        tokens = list(prompt)
        for _ in range(params.max_tokens):
            token = int(changed(self.logits(tokens)[-1], tokens, len(prompt), params, eos_token_ids).argmax())
            tokens.append(token)
            ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
            if token in ends:
                break
        return tokens[len(prompt) :]

    def check(self, tokens: Sequence[int], first: int, told: Sequence[TokenLogprobs], num_top: int) -> None:
        """Assert that `told` is what holds of the tokens from place `first` on."""
        expected = self.logprobs(tokens)
        assert [one.token_id for one in told] == list(tokens[first : first + len(told)])
        for place, one in enumerate(told, first):
            row = expected[place - 1]
            assert abs(row[one.token_id].item() - one.logprob) < TOLERANCE
            assert one.rank == int((row > row[one.token_id]).sum()) + 1
            likeliest = row.topk(num_top)
            assert [token for token, _ in one.top] == likeliest.indices.tolist()
            assert torch.allclose(
                torch.tensor([each for _, each in one.top]).double(), likeliest.values, atol=TOLERANCE
            )


def changed(
    logits: torch.Tensor, tokens: Sequence[int], num_prompt: int, params: SamplingParams, eos_token_ids: Sequence[int]
) -> torch.Tensor:
    """`[vocab_size]`: the logits that the next token is drawn from, one token after the other, in vLLM's order."""
    values = logits.tolist()
    output = list(tokens[num_prompt:])
    for token in range(len(values)):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            values[token] = -float("inf")
        if len(output) < params.min_tokens and token in (*params.stop_token_ids, *eos_token_ids):
            values[token] = -float("inf")
        values[token] += (params.logit_bias or {}).get(token, 0.0)
        if token in tokens:
            positive = values[token] > 0
            values[token] *= 1 / params.repetition_penalty if positive else params.repetition_penalty
        values[token] -= params.frequency_penalty * output.count(token)
        values[token] -= params.presence_penalty * (token in output)
    return torch.tensor(values, dtype=torch.float64)


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


def check_equal(outputs: Sequence[RequestOutput], others: Sequence[RequestOutput]) -> None:
    """Assert that the tokens are the same and the scores nearly."""
    assert [output.token_ids for output in outputs] == [output.token_ids for output in others]
    for output, expected in zip(outputs, others, strict=True):
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
                assert one.logprob == pytest.approx(other.logprob, abs=TOLERANCE)
                assert [token for token, _ in one.top] == [token for token, _ in other.top]

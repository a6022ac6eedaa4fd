"""What sampling parameters and log probabilities mean, once more and plainly, on what transformers computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from fastserve import SamplingParams
from fastserve.logprobs import TokenLogprobs

TOLERANCE = 1e-4


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

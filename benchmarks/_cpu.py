"""What the benchmarks share that hold our CPU engine against another: requests, our side, turns, the comparison."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fastserve import LLM, SamplingParams

REQUESTS, BATCH, PROMPT, OUTPUT = 32, 16, 128, 64

Tokens = list[list[int]]
Run = Callable[[Tokens], tuple[float, Tokens]]
"""From prompts to the seconds it took and the outputs."""


@dataclass
class Outcome:
    """What a competitor made of its turns."""

    seconds: list[float] = field(default_factory=list)
    outputs: Tokens = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens, by the median of the turns."""
        return REQUESTS * OUTPUT / statistics.median(self.seconds)


def make_prompts(vocab_size: int) -> Tokens:
    """The same every time; no token that a tokenizer reserves."""
    return torch.randint(4, vocab_size, (REQUESTS, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()


def timed(generate: Callable[[Tokens], Tokens]) -> Run:
    """A competitor of this process."""

    def run(prompts: Tokens) -> tuple[float, Tokens]:
        began = time.perf_counter()
        outputs = generate(prompts)
        return time.perf_counter() - began, outputs

    return run


def engine_run(llm: LLM) -> Run:
    """Ours."""
    params = SamplingParams(max_tokens=OUTPUT, ignore_eos=True)
    return timed(
        lambda prompts: [out.token_ids for out in llm.generate(prompt_token_ids=prompts, sampling_params=params)]
    )


def take_turns(runs: Mapping[str, Run], prompts: Tokens, repeats: int) -> dict[str, Outcome]:
    """Each competitor once per repeat, after a batch to warm up."""
    outcomes = {name: Outcome() for name in runs}
    for run in runs.values():
        run(prompts[:BATCH])
    for _ in range(repeats):
        for name, run in runs.items():
            seconds, outcomes[name].outputs = run(prompts)
            outcomes[name].seconds.append(seconds)
    return outcomes


def compare(label: str, outcomes: Mapping[str, Outcome], ours: Sequence[str], theirs: str) -> None:
    """Print, for each of ours: both throughputs, the ratio of each pair of turns, how many outputs are equal."""
    other = outcomes[theirs]
    for name in ours:
        own = outcomes[name]
        pairs = [a / b for a, b in zip(other.seconds, own.seconds, strict=True)]
        equal = sum(a == b for a, b in zip(own.outputs, other.outputs, strict=True))
        print(
            f"{label}: {name} {own.tokens_per_s:.1f} tokens/s, {theirs} {other.tokens_per_s:.1f}, ratio of medians "
            f"{own.tokens_per_s / other.tokens_per_s:.2f} (pairs {', '.join(f'{ratio:.2f}' for ratio in pairs)}), "
            f"{equal} of {REQUESTS} outputs equal",
            flush=True,
        )

"""I6 on several ranks: however a model is divided over them, greedy tokens are those of one, and of transformers.

The ranks of a shape are started once and serve policies one after the other.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from fastserve import LLM, SamplingParams  # noqa: E402
from support.ranks import rank_group  # noqa: E402
from support.tokens import (  # noqa: E402
    EVERY_WAY,
    NUM_REQUESTS,
    NUM_TOKENS,
    Reference,
    check_short_of_cache,
    make_reference,
    prompts,
)  # fmt: skip

DIVIDED = [
    ("opt", 1, 2), ("llama", 1, 4), ("llama", 2, 1), ("opt", 2, 2), ("llama", 2, 2), ("opt", 4, 1),
    ("opt", 2, 4), ("llama", 4, 2),
]  # fmt: skip
"""Family, tensor by pipeline parallel, up to 8 ranks. The models have 4 layers, 4 heads and, the Llama, 2 KV heads."""

TWO_WAYS = [("fastserve", "proactive"), ("vllm-chunked", "as it is")]
"""For more than two ranks, which take turns on a small machine's cores."""


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    @functools.cache
    def reference_of(family: str) -> Reference:
        return make_reference(family, tmp_path_factory.mktemp(family), num_layers=4)

    return reference_of


@pytest.mark.parametrize(("family", "tp", "pp"), DIVIDED, ids=lambda value: str(value))
def test_i6_on_several_ranks(references: Callable[[str], Reference], family: str, tp: int, pp: int) -> None:
    """With temperature, too, a token is what one rank draws."""
    reference = references(family)
    with rank_group(reference[0], tp, pp, num_gpu_blocks=200, num_host_blocks=100, timeout_s=60.0) as ranks:
        parallel = {"ranks": ranks, "tensor_parallel_size": tp, "pipeline_parallel_size": pp}
        for policy, swap in EVERY_WAY if tp * pp == 2 else TWO_WAYS:
            print(f"policy {policy}, swap {swap}")  # Shown if it fails.
            num_before = ranks.num_runs
            check_short_of_cache(reference, policy, swap, "cpu", **parallel)
            assert ranks.num_runs > num_before, "the ranks computed nothing"
        assert sampled(reference[0], **parallel) == sampled(reference[0])


def sampled(directory: Path, **arguments: object) -> list[list[int]]:
    params = [
        SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, top_p=0.9, seed=i, ignore_eos=True)
        for i in range(NUM_REQUESTS)
    ]
    with LLM(directory, policy="fastserve-fcfs", num_gpu_blocks=200, max_batch_size=4, **arguments) as llm:
        return [one.token_ids for one in llm.generate(prompt_token_ids=prompts(), sampling_params=params)]

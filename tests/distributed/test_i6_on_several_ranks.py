"""I6 on several ranks: however a model is divided over them, greedy tokens are those of one, and of transformers.

The ranks of a shape are started once and serve every policy and way of moving caches.
"""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from fastserve import LLM, SamplingParams  # noqa: E402
from support.ranks import rank_group  # noqa: E402
from support.tokens import (  # noqa: E402
    NUM_REQUESTS,
    NUM_TOKENS,
    SHORT_OF_CACHE,
    Reference,
    check_short_of_cache,
    make_reference,
    prompts,
)  # fmt: skip

SHAPES = [(1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)]
"""Tensor by pipeline parallel, up to 8 ranks. The models have 4 layers, 4 heads and, the Llama, 2 KV heads."""


@pytest.fixture(scope="module", params=["opt", "llama"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(request.param, tmp_path_factory.mktemp(request.param), num_layers=4)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"tp{shape[0]}-pp{shape[1]}")
def test_i6_on_several_ranks(reference: Reference, shape: tuple[int, int]) -> None:
    """With temperature, too, a token is what one rank draws."""
    with rank_group(reference[0], *shape, num_gpu_blocks=200, num_host_blocks=100, timeout_s=60.0) as ranks:
        parallel = {"ranks": ranks, "tensor_parallel_size": shape[0], "pipeline_parallel_size": shape[1]}
        for policy, swap in SHORT_OF_CACHE:
            print(f"policy {policy}, swap {swap}")  # Shown if it fails.
            check_short_of_cache(reference, policy, swap, "cpu", **parallel)
        assert sampled(reference[0], **parallel) == sampled(reference[0])


def sampled(directory: Path, **arguments: object) -> list[list[int]]:
    params = [
        SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, top_p=0.9, seed=i, ignore_eos=True)
        for i in range(NUM_REQUESTS)
    ]
    with LLM(directory, policy="fastserve-fcfs", num_gpu_blocks=200, max_batch_size=4, **arguments) as llm:
        return [one.token_ids for one in llm.generate(prompt_token_ids=prompts(), sampling_params=params)]

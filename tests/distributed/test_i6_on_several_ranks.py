"""I6 on several ranks: however a model is divided over them, its tokens and scores are those of one rank.

Greedy tokens are those of transformers as well. The ranks of a shape are started once and serve every check of it.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from fastserve import LLM, SamplingParams  # noqa: E402
from fastserve.llm import RequestOutput  # noqa: E402
from support import parameters  # noqa: E402
from support.ranks import rank_group  # noqa: E402
from support.tokens import (  # noqa: E402
    CHUNK,
    EVERY_WAY,
    NUM_REQUESTS,
    TINY_POOL,
    Reference,
    check_short_of_cache,
    make_reference,
    prompts,
)  # fmt: skip

DIVIDED = [
    ("opt", 1, 2), ("llama", 1, 4), ("llama", 2, 1), ("opt", 2, 2), ("llama", 2, 2), ("opt", 4, 1),
    ("opt", 2, 4), ("llama", 4, 2),
]  # fmt: skip
"""Family, tensor by pipeline parallel, up to 8 ranks. The models have 4 heads and, the Llama, 2 KV heads."""

TWO_WAYS = [("fastserve", "proactive"), ("vllm-chunked", "as it is")]
"""For more than two ranks, which take turns on a small machine's cores."""


class OneRank:
    """A model and what a single rank computes with it, each computed once."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference

    @functools.cached_property
    def sampled(self) -> list[list[int]]:
        return sampled(self.reference[0])

    @functools.cached_property
    def parameters(self) -> list[RequestOutput]:
        return parameters.generate(self.reference[0], "fastserve-fcfs", {}, num_gpu_blocks=100)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], OneRank]:
    @functools.cache
    def make(family: str, num_layers: int) -> OneRank:
        return OneRank(make_reference(family, tmp_path_factory.mktemp(family), num_layers))

    return make


@pytest.mark.parametrize(("family", "tp", "pp"), DIVIDED, ids=lambda value: str(value))
def test_i6_on_several_ranks(models: Callable[[str, int], OneRank], family: str, tp: int, pp: int) -> None:
    model = models(family, max(2, pp))
    directory = model.reference[0]
    with rank_group(directory, tp, pp, num_gpu_blocks=200, num_host_blocks=100, timeout_s=60.0) as ranks:
        parallel = {"ranks": ranks, "tensor_parallel_size": tp, "pipeline_parallel_size": pp}
        for policy, swap in EVERY_WAY if tp * pp == 2 else TWO_WAYS:
            print(f"policy {policy}, swap {swap}")  # Shown if it fails.
            num_before = ranks.num_runs
            check_short_of_cache(model.reference, policy, swap, "cpu", **parallel)
            assert ranks.num_runs > num_before, "the ranks computed nothing"
        assert sampled(directory, **parallel) == model.sampled
        if family == "llama" and tp * pp <= 4:
            check_parameters(model, parallel)


def sampled(directory: Path, **arguments: Any) -> list[list[int]]:
    """Tokens drawn with a temperature."""
    params = [
        SamplingParams(max_tokens=12, temperature=0.8, top_p=0.9, seed=i, ignore_eos=True) for i in range(NUM_REQUESTS)
    ]
    with LLM(directory, policy="fastserve-fcfs", num_gpu_blocks=200, max_batch_size=4, **arguments) as llm:
        return [one.token_ids for one in llm.generate(prompt_token_ids=prompts(), sampling_params=params)]


def check_parameters(model: OneRank, parallel: dict[str, Any]) -> None:
    """Assert that what changes a draw, and what is told of it, is as on one rank."""
    for policy, options in (("fastserve", {"swap": "recompute"}), ("vllm-chunked", {"chunk_tokens": CHUNK})):
        directory = model.reference[0]
        outputs = parameters.generate(directory, policy, options, num_gpu_blocks=TINY_POOL, **parallel)
        parameters.check_equal(outputs, model.parameters)

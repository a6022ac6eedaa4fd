"""I6: whatever preemption, swapping and recomputation did, greedy tokens are those of an undisturbed run and of
transformers, in float32. Under every policy, in every way it has to move caches."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from fastserve import LLM, SamplingParams  # noqa: E402
from support.devices import NEEDS_GPU, NEEDS_INTERPRETER  # noqa: E402
from support.tokens import (  # noqa: E402
    CHUNK,
    EVERY_WAY,
    NUM_REQUESTS,
    NUM_TOKENS,
    SHORT_OF_CACHE,
    TINY_POOL,
    Reference,
    check_short_of_cache,
    generate,
    make_reference,
    prompts,
)  # fmt: skip


@pytest.fixture(scope="module", params=["opt", "llama"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("policy", ["fastserve", "fastserve-fcfs", "vllm"])
def test_i6_undisturbed(reference: Reference, policy: str) -> None:
    directory, expected = reference
    tokens, counts = generate(directory, policy, {}, num_gpu_blocks=200, max_batch_size=NUM_REQUESTS)
    assert tokens == expected
    assert counts["swap_out_bytes"] == counts["recomputed_tokens"] == 0


@pytest.mark.parametrize(("policy", "swap"), SHORT_OF_CACHE)
def test_i6_short_of_cache(reference: Reference, policy: str, swap: str) -> None:
    check_short_of_cache(reference, policy, swap, "cpu")


@pytest.mark.parametrize(("policy", "swap"), EVERY_WAY)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])
def test_i6_on_a_gpu(reference: Reference, policy: str, swap: str, device: str) -> None:
    """Not every policy, for a GPU's time is short."""
    check_short_of_cache(reference, policy, swap, device)


@NEEDS_INTERPRETER
def test_i6_with_kernels_and_decodes_as_on_a_gpu(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, by Triton's interpreter: the same but for graphs and streams. It is slow, so requests are few."""
    monkeypatch.setenv("FASTSERVE_KERNELS", "triton")
    few = {"num_requests": 5, "num_tokens": 12, "num_gpu_blocks": 7}
    check_short_of_cache(reference, "fastserve", "proactive", "cpu", **few)


@pytest.mark.parametrize(("policy", "swap"), EVERY_WAY)
def test_i6_with_a_dropped_cache_found_again(reference: Reference, policy: str, swap: str) -> None:
    directory, expected = reference
    options = {"chunk_tokens": CHUNK, "v1": True} if policy == "vllm-chunked" else {"swap": swap}
    sizes = {"num_host_blocks": 0, "num_gpu_blocks": 11}
    plain, counts = generate(directory, policy, options, **sizes)
    tokens, found = generate(directory, policy, options, prefix_caching=True, **sizes)
    assert tokens == plain == expected
    assert counts["cached_tokens"] == 0
    # Where a cache is dropped only when nothing else can run, all blocks are given out before the request resumes.
    assert (found["cached_tokens"] > 0) == (swap != "none")
    assert found["recomputed_tokens"] <= counts["recomputed_tokens"]


def test_i6_host_memory_full(reference: Reference) -> None:
    directory, expected = reference
    tokens, counts = generate(directory, "fastserve", {"swap": "reactive"}, num_host_blocks=4)
    assert tokens == expected
    assert counts["swap_out_bytes"] > 0
    assert counts["recomputed_tokens"] > 0


def test_i6_sampled_tokens_do_not_depend_on_the_schedule(reference: Reference) -> None:
    directory, _ = reference
    runs = []
    for policy, blocks in (("fastserve-fcfs", 200), ("vllm", TINY_POOL)):
        with LLM(directory, policy=policy, num_gpu_blocks=blocks, max_batch_size=4) as llm:
            params = [
                SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, top_p=0.9, seed=i, ignore_eos=True)
                for i in range(NUM_REQUESTS)
            ]
            outputs = llm.generate(prompt_token_ids=prompts(), sampling_params=params)
            runs.append([output.token_ids for output in outputs])
    assert runs[0] == runs[1]

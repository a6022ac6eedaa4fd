"""I6: whatever preemption, swapping and recomputation did, greedy tokens are those of an undisturbed run and of
transformers, in float32. Under every policy, in every way it has to move caches."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from fastserve import LLM, SamplingParams  # noqa: E402
from fastserve.options import option_names  # noqa: E402
from fastserve.scheduler import find_policy, list_policies  # noqa: E402
from support.devices import NEEDS_GPU, NEEDS_INTERPRETER  # noqa: E402

NUM_REQUESTS, NUM_TOKENS = 8, 24
TINY_POOL = 9
"""Blocks of 16 tokens: two requests fit at their full length, three do not."""


def save_model(family: str, directory: Path) -> None:
    torch.manual_seed(0)
    if family == "opt":
        config = transformers.OPTConfig(
            vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128,
            max_position_embeddings=256, word_embed_proj_dim=64, dropout=0.0, init_std=0.3,
        )  # fmt: skip
        model = transformers.OPTForCausalLM(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=128, max_position_embeddings=256, initializer_range=0.3,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(directory)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 50, (NUM_REQUESTS,), generator=generator).tolist()
    return [torch.randint(5, 500, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module", params=["opt", "llama"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A saved model and what transformers generates from each prompt alone."""
    directory = tmp_path_factory.mktemp(request.param)
    save_model(request.param, directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    expected = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=-1
        )  # fmt: skip
        expected.append(output[0, len(prompt) :].tolist())
    return directory, expected


IMPATIENT = {"alpha_s": 0.001, "quantum_base_s": 0.0005, "starvation_check_every": 1}
"""Short quanta and waits, so that requests take turns all the time."""
CHUNK = 8
SWAP_MODES = {
    **dict.fromkeys(sorted(list_policies()), ("as it is",)),
    **dict.fromkeys(
        ("fastserve", "fastserve-artifact", "fastserve-fcfs", "fixed-priority", "mlfq", "srpt"),
        ("proactive", "reactive", "recompute", "none"),
    ),
    "vllm": ("recompute", "reactive"),
}
SHORT_OF_CACHE = [(policy, swap) for policy, modes in SWAP_MODES.items() for swap in modes]


def generate(
    directory: Path, policy: str, options: dict, device: str = "cpu", **sizes: int
) -> tuple[list[list[int]], dict[str, int]]:
    arguments = {"num_gpu_blocks": TINY_POOL, "num_host_blocks": 100, "max_batch_size": 4} | sizes
    known = option_names(find_policy(policy).Options)
    options = {name: value for name, value in IMPATIENT.items() if name in known} | options
    # A profile, so that decisions are those of the same latencies every time.
    with LLM(
        directory, policy=policy, policy_options=options, profile="a100-80g/opt-13b-tp1", block_size=16, device=device,
        **arguments,
    ) as llm:  # fmt: skip
        params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
        outputs = llm.generate(prompt_token_ids=prompts(), sampling_params=params)
        llm.engine.kv.check_invariants()
        assert llm.engine.kv.num_free_gpu_blocks == arguments["num_gpu_blocks"]
        assert llm.engine.kv.num_free_host_blocks == arguments["num_host_blocks"]
        most_tokens = max(record.num_scheduled_tokens for record in llm.engine.iterations)
    counts = {
        name: sum(getattr(output.metrics, name) for output in outputs)
        for name in ("preemptions", "swap_out_bytes", "swap_in_bytes", "recomputed_tokens")
    }
    return [output.token_ids for output in outputs], counts | {"most_tokens": most_tokens}


@pytest.mark.parametrize("policy", ["fastserve", "fastserve-fcfs", "vllm"])
def test_i6_undisturbed(reference: tuple[Path, list[list[int]]], policy: str) -> None:
    directory, expected = reference
    tokens, counts = generate(directory, policy, {}, num_gpu_blocks=200, max_batch_size=NUM_REQUESTS)
    assert tokens == expected
    assert counts["swap_out_bytes"] == counts["recomputed_tokens"] == 0


@pytest.mark.parametrize(("policy", "swap"), SHORT_OF_CACHE)
def test_i6_short_of_cache(reference: tuple[Path, list[list[int]]], policy: str, swap: str) -> None:
    check_short_of_cache(reference, policy, swap, "cpu")


@pytest.mark.parametrize(
    ("policy", "swap"),
    [
        ("fastserve", "proactive"),
        ("fastserve", "reactive"),
        ("fastserve", "recompute"),
        ("fastserve-fcfs", "none"),
        ("vllm", "reactive"),
        ("vllm-chunked", "as it is"),
    ],
)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])
def test_i6_on_a_gpu(reference: tuple[Path, list[list[int]]], policy: str, swap: str, device: str) -> None:
    """Every way of moving caches and of filling a batch; not every policy, for a GPU's time is short."""
    check_short_of_cache(reference, policy, swap, device)


@NEEDS_INTERPRETER
def test_i6_with_kernels_and_decodes_as_on_a_gpu(
    reference: tuple[Path, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, by Triton's interpreter: the same but for graphs and streams."""
    monkeypatch.setenv("FASTSERVE_KERNELS", "triton")
    check_short_of_cache(reference, "fastserve", "proactive", "cpu")


def check_short_of_cache(reference: tuple[Path, list[list[int]]], policy: str, swap: str, device: str) -> None:
    directory, expected = reference
    options = {"chunk_tokens": CHUNK} if policy == "vllm-chunked" else {}
    # With a pool as tiny as the others', the artifact finds hardly anyone to move, and is left to drop.
    blocks = 16 if (policy, swap) == ("fastserve-artifact", "proactive") else TINY_POOL
    tokens, counts = generate(
        directory, policy, options if swap == "as it is" else {"swap": swap}, device, num_gpu_blocks=blocks
    )
    assert tokens == expected
    assert (counts["swap_out_bytes"] > 0) == (swap in ("proactive", "reactive"))
    assert counts["swap_in_bytes"] == counts["swap_out_bytes"]
    if swap == "reactive":
        assert counts["recomputed_tokens"] == 0
    if swap == "recompute" or policy == "vllm-chunked":
        assert counts["recomputed_tokens"] > 0
    if policy == "vllm-chunked":
        assert counts["most_tokens"] <= CHUNK < max(map(len, prompts())), "no prompt was chunked"


def test_i6_host_memory_full(reference: tuple[Path, list[list[int]]]) -> None:
    directory, expected = reference
    tokens, counts = generate(directory, "fastserve", {"swap": "reactive"}, num_host_blocks=4)
    assert tokens == expected
    assert counts["swap_out_bytes"] > 0
    assert counts["recomputed_tokens"] > 0


def test_i6_sampled_tokens_do_not_depend_on_the_schedule(reference: tuple[Path, list[list[int]]]) -> None:
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

"""I6 put to the test: small models, what transformers generates with them, and engines that are short of cache."""

from pathlib import Path
from typing import Any

import torch
import transformers

from fastserve import LLM, SamplingParams
from fastserve.core.options import option_names
from fastserve.policies.discovery import find_policy, list_policies

Reference = tuple[Path, list[list[int]]]
"""A model's directory, and the tokens expected for each of `prompts`."""
NUM_REQUESTS, NUM_TOKENS = 8, 24
TINY_POOL = 9
"""Blocks of 16 tokens: two requests fit at their full length, three do not."""


def save_model(
    family: str, directory: Path, num_layers: int, *, vocab_size: int = 500, max_model_len: int = 256
) -> None:
    torch.manual_seed(0)
    if family == "opt":
        config = transformers.OPTConfig(
            vocab_size=vocab_size, hidden_size=64, num_hidden_layers=num_layers, num_attention_heads=4, ffn_dim=128,
            max_position_embeddings=max_model_len, word_embed_proj_dim=64, dropout=0.0, init_std=0.3,
        )  # fmt: skip
        model = transformers.OPTForCausalLM(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=vocab_size, hidden_size=64, num_hidden_layers=num_layers, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=128, max_position_embeddings=max_model_len, initializer_range=0.3,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(directory)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 50, (NUM_REQUESTS,), generator=generator).tolist()
    return [torch.randint(5, 500, (length,), generator=generator).tolist() for length in lengths]


def make_reference(family: str, directory: Path, num_layers: int = 2) -> Reference:
    """A saved model and what transformers generates from each prompt alone."""
    save_model(family, directory, num_layers)
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
        ("fastserve", "fastserve-artifact", "fastserve-fcfs", "fixed-priority", "gittins", "mlfq", "srpt"),
        ("proactive", "reactive", "recompute", "none"),
    ),
    "vllm": ("recompute", "reactive"),
}
SHORT_OF_CACHE = [(policy, swap) for policy, modes in SWAP_MODES.items() for swap in modes]
EVERY_WAY = [
    ("fastserve", "proactive"),
    ("fastserve", "reactive"),
    ("fastserve", "recompute"),
    ("fastserve-fcfs", "none"),
    ("vllm", "reactive"),
    ("vllm-chunked", "as it is"),
]
"""Every way of moving caches and of filling a batch, where there is no time for every policy."""


def generate(
    directory: Path,
    policy: str,
    options: dict,
    device: str = "cpu",
    *,
    num_requests: int = NUM_REQUESTS,
    num_tokens: int = NUM_TOKENS,
    **arguments: Any,
) -> tuple[list[list[int]], dict[str, int]]:
    """Serve the first `num_requests` of `prompts`; return the tokens of each, and sums of their metrics."""
    arguments = {"num_gpu_blocks": TINY_POOL, "num_host_blocks": 100, "max_batch_size": 4} | arguments
    known = option_names(find_policy(policy).Options)
    options = {name: value for name, value in IMPATIENT.items() if name in known} | options
    # A profile, so that decisions are those of the same latencies every time.
    with LLM(
        directory, policy=policy, policy_options=options, profile="a100-80g/opt-13b-tp1", block_size=16, device=device,
        **arguments,
    ) as llm:  # fmt: skip
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        outputs = llm.generate(prompt_token_ids=prompts()[:num_requests], sampling_params=params)
        llm.engine.kv.check_invariants()
        assert llm.engine.kv.num_free_gpu_blocks == arguments["num_gpu_blocks"]
        assert llm.engine.kv.num_free_host_blocks == arguments["num_host_blocks"]
        most_tokens = max(record.num_scheduled_tokens for record in llm.engine.iterations)
    counts = {
        name: sum(getattr(output.metrics, name) for output in outputs)
        for name in ("preemptions", "swap_out_bytes", "swap_in_bytes", "recomputed_tokens", "cached_tokens")
    }
    return [output.token_ids for output in outputs], counts | {"most_tokens": most_tokens}


def check_short_of_cache(
    reference: Reference,
    policy: str,
    swap: str,
    device: str,
    *,
    num_requests: int = NUM_REQUESTS,
    num_tokens: int = NUM_TOKENS,
    num_gpu_blocks: int = TINY_POOL,
    **arguments: Any,
) -> None:
    """Assert that a pool too small for the batch changes no token, and that caches move as `swap` says."""
    directory, expected = reference
    options = {"chunk_tokens": CHUNK} if policy == "vllm-chunked" else {}
    # With a pool as tiny as the others', the artifact finds hardly anyone to move, and is left to drop.
    blocks = 16 if (policy, swap) == ("fastserve-artifact", "proactive") else num_gpu_blocks
    options |= {} if swap == "as it is" else {"swap": swap}
    if policy == "fastserve-artifact":
        options["wait_for_swaps"] = True
    sizes = {"num_requests": num_requests, "num_tokens": num_tokens, "num_gpu_blocks": blocks}
    tokens, counts = generate(directory, policy, options, device, **sizes, **arguments)
    assert tokens == [row[:num_tokens] for row in expected[:num_requests]]
    assert (counts["swap_out_bytes"] > 0) == (swap in ("proactive", "reactive"))
    assert counts["swap_in_bytes"] == counts["swap_out_bytes"]
    if swap == "reactive":
        assert counts["recomputed_tokens"] == 0
    if swap == "recompute" or policy == "vllm-chunked":
        assert counts["recomputed_tokens"] > 0
    if policy == "vllm-chunked":
        assert counts["most_tokens"] <= CHUNK < max(map(len, prompts())), "no prompt was chunked"

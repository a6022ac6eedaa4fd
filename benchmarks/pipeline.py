"""Throughput of two pipeline stages on two cores against one on one, side by side, a thread each.

The same model and requests; both serve batches of the same size, so that every iteration is the same work, of which a
stage does half: the layers are OPT-125m's, but the vocabulary is small, since the output projection to a large one is
work for the last stage alone, and for decodes more than for prompts. Two stages at their best do twice as much. They
take turns; medians and their ratio are what counts; the target is at least 1.5. Printed beside it: the same model on
two shards (tensor parallel), which pay two sums over all shards a layer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from fastserve import LLM, SamplingParams

PROMPT, VOCABULARY = 16, 1000
MODEL = {
    "architectures": ["OPTForCausalLM"], "vocab_size": VOCABULARY, "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "ffn_dim": 3072, "max_position_embeddings": 2048, "word_embed_proj_dim": 768,
}  # fmt: skip
SHAPES = {"1 stage": (1, 1), "2 stages": (1, 2), "2 shards": (2, 1)}


def main() -> None:
    """Print tokens per second of each, and ratios to one stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    prompts = torch.randint(4, VOCABULARY, (arguments.requests, PROMPT)).tolist()
    params = SamplingParams(max_tokens=arguments.output_tokens, ignore_eos=True)
    seconds: dict[str, list[float]] = {name: [] for name in SHAPES}
    with ExitStack() as stack:
        model = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (model / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
        engines = {}
        for name, (tensor, pipeline) in SHAPES.items():
            torch.set_num_threads(tensor * pipeline)  # Divided among the ranks: one for each.
            engines[name] = stack.enter_context(
                LLM(
                    model,
                    load_format="dummy",
                    policy="fastserve-fcfs",
                    num_gpu_blocks=512,
                    num_host_blocks=0,
                    max_batch_size=arguments.batch,
                    tensor_parallel_size=tensor,
                    pipeline_parallel_size=pipeline,
                )
            )
        torch.set_num_threads(1)
        tokens = {}
        for repeat in range(1 + arguments.repeats):
            for name, llm in engines.items():
                began = time.perf_counter()
                outputs = llm.generate(prompt_token_ids=prompts, sampling_params=params)
                if repeat:  # The first warms up.
                    seconds[name].append(time.perf_counter() - began)
                tokens[name] = [output.token_ids for output in outputs]
    produced = arguments.requests * arguments.output_tokens
    base = seconds["1 stage"]
    print(f"12 layers of 768, float32, batch {arguments.batch}, a thread each, {os.cpu_count()} cores:")
    for name, times in seconds.items():
        ratios = [one / other for one, other in zip(base, times, strict=True)]
        equal = sum(a == b for a, b in zip(tokens[name], tokens["1 stage"], strict=True))
        print(
            f"{name}: {produced / statistics.median(times):.1f} tokens/s, {statistics.median(ratios):.2f} of 1 stage "
            f"({min(ratios):.2f} to {max(ratios):.2f}); {equal} of {len(prompts)} outputs equal"
        )


if __name__ == "__main__":
    main()

"""Output tokens per second of the whole engine against transformers generate(), one CPU thread, side by side.

OPT-125m's shape with the same random weights; 32 requests of 128 prompt tokens and 64 output tokens; batch 16
(static batches for generate()). The two take turns in one process; medians and their ratio are what counts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from transformers import OPTConfig, OPTForCausalLM

from fastserve import LLM, SamplingParams

REQUESTS, BATCH, PROMPT, OUTPUT = 32, 16, 128, 64

Tokens = list[list[int]]


def engine_runner(llm: LLM) -> Callable[[Tokens], Tokens]:
    """Generate with our engine."""
    params = SamplingParams(max_tokens=OUTPUT, ignore_eos=True)

    def run(prompts: Tokens) -> Tokens:
        return [output.token_ids for output in llm.generate(prompt_token_ids=prompts, sampling_params=params)]

    return run


def transformers_runner(model: OPTForCausalLM) -> Callable[[Tokens], Tokens]:
    """Generate with transformers, a batch at a time."""

    @torch.inference_mode()
    def run(prompts: Tokens) -> Tokens:
        outputs: Tokens = []
        for first in range(0, len(prompts), BATCH):
            ids = torch.tensor(prompts[first : first + BATCH])
            result = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=OUTPUT, do_sample=False)
            outputs += result[:, PROMPT:].tolist()
        return outputs

    return run


def main() -> None:
    """Print both throughputs and their ratio for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="fastserve-fcfs")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    prompts = torch.randint(4, 50_000, (REQUESTS, PROMPT)).tolist()
    for dtype in arguments.dtype:
        reference = OPTForCausalLM(OPTConfig(eos_token_id=None)).to(getattr(torch, dtype)).eval()
        with tempfile.TemporaryDirectory() as directory:
            reference.save_pretrained(directory)
            llm = LLM(directory, policy=arguments.policy, dtype=dtype, num_gpu_blocks=512, max_batch_size=BATCH)
        runs = {"transformers": transformers_runner(reference), "fastserve": engine_runner(llm)}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        outputs: dict[str, Tokens] = {}
        for run in runs.values():
            run(prompts[:BATCH])
        for _ in range(arguments.repeats):
            for name, run in runs.items():
                began = time.perf_counter()
                outputs[name] = run(prompts)
                seconds[name].append(time.perf_counter() - began)
        llm.close()
        ours, theirs = (REQUESTS * OUTPUT / statistics.median(seconds[name]) for name in ("fastserve", "transformers"))
        pairs = [a / b for a, b in zip(seconds["transformers"], seconds["fastserve"], strict=True)]
        equal = sum(a == b for a, b in zip(outputs["fastserve"], outputs["transformers"], strict=True))
        print(
            f"{dtype}: {arguments.policy} {ours:.1f} tokens/s, transformers {theirs:.1f}, ratio of medians "
            f"{ours / theirs:.2f} (pairs {', '.join(f'{ratio:.2f}' for ratio in pairs)}), "
            f"{equal} of {REQUESTS} outputs equal",
            flush=True,
        )


if __name__ == "__main__":
    main()

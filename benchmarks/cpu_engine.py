"""Output tokens per second of the whole engine against transformers generate(), one CPU thread, side by side.

OPT-125m's shape with the same random weights; 32 requests of 128 prompt tokens and 64 output tokens; batch 16
(static batches for generate()). The two take turns in one process; medians and their ratio are what counts.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from _cpu import BATCH, OUTPUT, PROMPT, Tokens, compare, engine_run, make_prompts, take_turns, timed
from transformers import OPTConfig, OPTForCausalLM

from fastserve import LLM


def transformers_generate(model: OPTForCausalLM, prompts: Tokens) -> Tokens:
    """Generate with transformers, a batch at a time."""
    outputs: Tokens = []
    for first in range(0, len(prompts), BATCH):
        ids = torch.tensor(prompts[first : first + BATCH])
        with torch.inference_mode():
            result = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=OUTPUT, do_sample=False)
        outputs += result[:, PROMPT:].tolist()
    return outputs


def main() -> None:
    """Print both throughputs and their ratio for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="fastserve-fcfs")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for dtype in arguments.dtype:
        reference = OPTForCausalLM(OPTConfig(eos_token_id=None)).to(getattr(torch, dtype)).eval()
        with tempfile.TemporaryDirectory() as directory:
            reference.save_pretrained(directory)
            llm = LLM(directory, policy=arguments.policy, dtype=dtype, num_gpu_blocks=512, max_batch_size=BATCH)
        with llm:
            runs = {
                "transformers": timed(lambda prompts, model=reference: transformers_generate(model, prompts)),
                arguments.policy: engine_run(llm),
            }
            outcomes = take_turns(runs, make_prompts(llm.model_config.vocab_size), arguments.repeats)
        compare(dtype, outcomes, [arguments.policy], "transformers")


if __name__ == "__main__":
    main()

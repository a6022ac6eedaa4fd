"""Output tokens per second of Worker against transformers generate(), on one CPU thread, alternating in one process.

32 requests of 128 prompt tokens and 64 output tokens in static batches of 16, OPT-125m's shape with random weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from transformers import OPTConfig, OPTForCausalLM

from fastserve.models import SequenceInput, load_config
from fastserve.worker import Worker

REQUESTS, BATCH, PROMPT, OUTPUT, BLOCK = 32, 16, 128, 64, 16
GREEDY = SimpleNamespace(temperature=0.0, top_p=1.0, top_k=0, seed=0)


def run_worker(worker: Worker, prompts: list[list[int]]) -> list[list[int]]:
    """Generate batch after batch; returns the output tokens of every prompt."""
    blocks = -(-(PROMPT + OUTPUT) // BLOCK)
    tables = [list(range(row * blocks, (row + 1) * blocks)) for row in range(BATCH)]
    outputs: list[list[int]] = []
    for first in range(0, len(prompts), BATCH):
        pending, start = prompts[first : first + BATCH], 0
        generated: list[list[int]] = [[] for _ in pending]
        for _ in range(OUTPUT):
            sequences = [SequenceInput(tokens, start, table) for tokens, table in zip(pending, tables, strict=True)]
            start += len(pending[0])
            tokens = worker.execute(sequences, [GREEDY] * len(sequences))
            for row, token in zip(generated, tokens, strict=True):
                row.append(token)
            pending = [[token] for token in tokens]
        outputs += generated
    return outputs


@torch.inference_mode()
def run_transformers(model: OPTForCausalLM, prompts: list[list[int]]) -> list[list[int]]:
    """The same with generate()."""
    outputs: list[list[int]] = []
    for first in range(0, len(prompts), BATCH):
        ids = torch.tensor(prompts[first : first + BATCH])
        result = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=OUTPUT,
            min_new_tokens=OUTPUT,
            do_sample=False,
        )
        outputs += result[:, PROMPT:].tolist()
    return outputs


def main() -> None:
    """Print both throughputs and their ratio for each type."""
    parser = argparse.ArgumentParser(description=__doc__)
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
            worker = Worker(
                load_config(directory),
                num_gpu_blocks=256,
                num_host_blocks=0,
                block_size=BLOCK,
                dtype=dtype,
                model_dir=directory,
            )
        runs: dict[str, Callable[[list[list[int]]], list[list[int]]]] = {
            "transformers": lambda p, model=reference: run_transformers(model, p),  # type: ignore[misc]
            "worker": lambda p, worker=worker: run_worker(worker, p),  # type: ignore[misc]
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        outputs: dict[str, list[list[int]]] = {}
        for run in runs.values():
            run(prompts[:BATCH])
        for _ in range(arguments.repeats):
            for name, run in runs.items():
                began = time.perf_counter()
                outputs[name] = run(prompts)
                seconds[name].append(time.perf_counter() - began)
        rate = {name: REQUESTS * OUTPUT / statistics.median(values) for name, values in seconds.items()}
        ratios = [a / b for a, b in zip(seconds["transformers"], seconds["worker"], strict=True)]
        equal = sum(a == b for a, b in zip(outputs["worker"], outputs["transformers"], strict=True))
        print(
            f"{dtype}: worker {rate['worker']:.1f} tok/s, transformers {rate['transformers']:.1f} tok/s, "
            f"ratio {rate['worker'] / rate['transformers']:.2f} (pairs {', '.join(f'{r:.2f}' for r in ratios)}), "
            f"{equal}/{REQUESTS} outputs equal",
            flush=True,
        )


if __name__ == "__main__":
    main()

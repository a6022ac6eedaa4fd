"""Decode steps and prefills of the worker against the floor that this machine sets, measured in the same run.

The floor of a step is the larger of two times: the bytes that must move (all weights of the layers and the LM head
once, the keys and values of the contexts, the new ones written) at the bandwidth of a large copy on the device, and the
arithmetic (2 FLOPs a weight of the layers and token, and causal attention) at the rate of a large matrix product.
Decode steps are the worker's CUDA graphs, timed on the device; beside them their matrix products alone, over the real
weights of all layers, and their attention alone, each as a graph. Blocks of the cache are scattered, and hold random
numbers.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _gpu import (
    captured,
    ceilings,
    device_seconds,
    layer_parameters,
    parser,
    read_weights_bytes,
    run_benchmark,
    table,
    verdict,
)

from fastserve.core.config import ModelConfig
from fastserve.core.presets import preset
from fastserve.core.request import SamplingParams
from fastserve.runtime.kernels import kernels_for
from fastserve.runtime.models import ForwardBatch, SequenceInput
from fastserve.runtime.models.layers import Linear
from fastserve.runtime.worker import Worker

BLOCK_SIZE = 16
DECODES = {
    "cuda": ((1, 512), (16, 512), (64, 512), (16, 2048), (64, 1024)),
    "cpu": ((1, 32), (4, 64)),
}
"""Batch and context of each request, its new token included."""
PREFILLS = {
    "cuda": (*((n,) for n in (16, 32, 64, 128, 192, 256, 512, 1024)), (512,) * 4, (2048,)),
    "cpu": ((16,), (32,) * 4, (128,)),
}
"""Prompts of an iteration; those of as many tokens as the last are judged."""
TARGETS = {(16, 512): 1.15, (64, 512): 1.25}
PREFILL_TARGET = 0.6
_AHEAD_OF_EAGER_S = 0.03
"""Enough for the host to queue a prefill, kernel by kernel."""


class Bench:
    """A worker, the ceilings, and iterations of given shapes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(arguments.device)
        self.config: ModelConfig = preset(arguments.model)
        self.dtype: str = arguments.dtype
        self.repeats: int = arguments.repeats
        self.decodes, self.prefills = DECODES[self.device.type], PREFILLS[self.device.type]
        self.ceilings = ceilings(self.device)
        shapes = [(size, context) for size, context in self.decodes]
        shapes += [(len(lengths), max(lengths)) for lengths in self.prefills]
        self.worker = Worker(
            self.config,
            num_gpu_blocks=max(size * -(-context // BLOCK_SIZE) for size, context in shapes),
            num_host_blocks=0,
            block_size=BLOCK_SIZE,
            device=arguments.device,
            dtype=self.dtype,
            max_batch_size=max(size for size, _ in self.decodes),
        )
        self.worker.gpu_cache.normal_()
        self.rng = random.Random(0)

    def sequences(self, shape: Sequence[tuple[int, int]]) -> list[SequenceInput]:
        """Requests of (tokens to compute, tokens in the cache before), in scattered blocks."""
        blocks = list(range(self.worker.gpu_cache.shape[0]))
        self.rng.shuffle(blocks)
        made = []
        for count, start in shape:
            needed = -(-(start + count) // BLOCK_SIZE)
            own, blocks = blocks[:needed], blocks[needed:]
            tokens = [self.rng.randrange(self.config.vocab_size) for _ in range(count)]
            made.append(SequenceInput(tokens, start, own))
        return made

    def launch(self, sequences: list[SequenceInput]) -> Callable[[], Callable[[], list[int]]]:
        """What starts an iteration of these, greedy."""
        params = [SamplingParams()] * len(sequences)
        return lambda: self.worker.launch(sequences, params)

    def host_seconds(self, sequences: list[SequenceInput]) -> tuple[float, float]:
        """Median seconds from launch to tokens on the host, and of the launch alone."""
        launch, whole, launching = self.launch(sequences), [], []
        for _ in range(self.repeats):
            self.worker.prepare(sequences)  # As an engine does while the last iteration runs.
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            finish = launch()
            launched = time.perf_counter()
            finish()
            whole.append(time.perf_counter() - began)
            launching.append(launched - began)
        return statistics.median(whole), statistics.median(launching)

    def seconds(self, run: Callable[[], object]) -> float:
        """Median of the device for `run`, captured."""
        return device_seconds(captured(run, self.device), self.device, self.repeats)


def decode(bench: Bench, batch: int, context: int) -> dict[str, Any]:
    """One decode shape: the step, its floor, and where its time goes."""
    config, bandwidth = bench.config, bench.ceilings["copy_bytes_per_s"]
    kv_bytes = config.kv_bytes_per_token(bench.dtype)
    weight_bytes = read_weights_bytes(config, bench.dtype)
    moved = weight_bytes + batch * (context + 1) * kv_bytes
    sequences = bench.sequences([(1, context - 1)] * batch)
    host_s, launch_s = bench.host_seconds(sequences)
    step_s = device_seconds(bench.launch(sequences), bench.device, bench.repeats, ahead_s=3e-3)
    products = matrix_products(bench, batch)
    products_s = sum(one["seconds"] for one in products)
    attention_s = attention(bench, sequences)
    return {
        "batch": batch,
        "context": context,
        "bytes": moved,
        "floor_s": moved / bandwidth,
        "device_s": step_s,
        "ratio": step_s * bandwidth / moved,
        "host_to_host_s": host_s,
        "launch_s": launch_s,
        "matrix_products_s": products_s,
        "matrix_products_ratio": products_s * bandwidth / weight_bytes,
        "matrix_products": products,
        "attention_s": attention_s,
        "attention_ratio": attention_s * bandwidth / (batch * context * kv_bytes),
        "other_s": step_s - products_s - attention_s,
    }


@torch.inference_mode()
def matrix_products(bench: Bench, batch: int) -> list[dict[str, Any]]:
    """Each projection alone, over the weights of all layers one after the other, so that no cache holds them."""
    layers = [
        [module for module in layer.modules() if isinstance(module, Linear)] for layer in bench.worker.model.layers
    ]
    kinds = [*zip(*layers, strict=True), (bench.worker.model.lm_head,)]
    measured = []
    for modules in kinds:
        hidden_size, parts = len(modules[0].columns.held), modules[0].rows
        rows = sum(len(share.held) for _, share in parts)
        x = torch.randn(batch, hidden_size, dtype=getattr(torch, bench.dtype), device=bench.device)

        def run(modules: Sequence[Linear] = modules, x: torch.Tensor = x) -> None:
            for module in modules:
                module(x)

        seconds = bench.seconds(run)
        moved = len(modules) * rows * hidden_size * x.element_size()
        measured.append(
            {
                "name": "+".join(name for name, _ in parts),
                "count": len(modules),
                "seconds": seconds,
                "ratio": seconds * bench.ceilings["copy_bytes_per_s"] / moved,
            }
        )
    return measured


@torch.inference_mode()
def attention(bench: Bench, sequences: list[SequenceInput]) -> float:
    """Seconds of all layers' attention alone."""
    config, worker = bench.config, bench.worker
    metadata = ForwardBatch.build(sequences, BLOCK_SIZE, bench.device).attention
    kernels, heads = kernels_for(bench.device), config.num_heads
    width = (heads + 2 * config.num_kv_heads) * config.head_dim
    # As the fused projection leaves it: a strided view.
    fused = torch.randn(len(sequences), width, dtype=worker.gpu_cache.dtype, device=bench.device)
    query = fused[:, : heads * config.head_dim].unflatten(-1, (heads, config.head_dim))

    def run() -> None:
        for layer in range(config.num_layers):
            kernels.paged_attention(query, worker.gpu_cache, layer, metadata, config.head_dim**-0.5)

    return bench.seconds(run)


def prefill(bench: Bench, lengths: tuple[int, ...]) -> dict[str, Any]:
    """One iteration of prompts against its floor."""
    config, num_tokens = bench.config, sum(lengths)
    flops = 2 * layer_parameters(config) * num_tokens
    flops += sum(2 * config.num_layers * config.num_heads * config.head_dim * n * (n + 1) for n in lengths)
    moved = read_weights_bytes(config, bench.dtype) + num_tokens * config.kv_bytes_per_token(bench.dtype)
    times = {
        "bytes": moved / bench.ceilings["copy_bytes_per_s"],
        "FLOPs": flops / bench.ceilings["matmul_flops_per_s"],
    }
    bound = max(times, key=lambda name: times[name])
    sequences = bench.sequences([(length, 0) for length in lengths])
    bench.launch(sequences)()()  # Compiles what these shapes need.
    host_s, launch_s = bench.host_seconds(sequences)
    step_s = device_seconds(bench.launch(sequences), bench.device, bench.repeats, _AHEAD_OF_EAGER_S)
    return {
        "prompts": list(lengths),
        "tokens": num_tokens,
        "flops": flops,
        "bytes": moved,
        "floor_s": times[bound],
        "bound_by": bound,
        "device_s": step_s,
        "host_to_host_s": host_s,
        "launch_s": launch_s,
        "ratio": host_s / times[bound],
        "share_of_matmul_rate": flops / host_s / bench.ceilings["matmul_flops_per_s"],
    }


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, and print the tables."""
    bench = Bench(arguments)
    decodes = [decode(bench, *shape) for shape in bench.decodes]
    print(f"decode steps of {arguments.model} in {arguments.dtype}, ms (x floor)")
    table(
        ("batch", "context", "GB", "floor", "device", "x", "host to host", "GEMMs", "attention", "other"),
        [
            (
                one["batch"],
                one["context"],
                f"{one['bytes'] / 1e9:.2f}",
                f"{one['floor_s'] * 1e3:.3f}",
                f"{one['device_s'] * 1e3:.3f}",
                f"{one['ratio']:.3f}",
                f"{one['host_to_host_s'] * 1e3:.3f}",
                f"{one['matrix_products_s'] * 1e3:.3f} ({one['matrix_products_ratio']:.2f})",
                f"{one['attention_s'] * 1e3:.3f} ({one['attention_ratio']:.2f})",
                f"{one['other_s'] * 1e3:.3f}",
            )
            for one in decodes
        ],
    )
    print("their matrix products, ms of all layers (x floor)")
    names = [product["name"] for product in decodes[0]["matrix_products"]]
    seen: dict[int, list[dict[str, Any]]] = {one["batch"]: one["matrix_products"] for one in decodes}
    table(
        ("batch", *names),
        [
            (batch, *(f"{product['seconds'] * 1e3:.3f} ({product['ratio']:.2f})" for product in products))
            for batch, products in seen.items()
        ],
    )
    prefills = [prefill(bench, lengths) for lengths in bench.prefills]
    print("prompts, ms; a launch that takes as long as the device says that the host is what limits")
    table(
        ("prompts", "tokens", "floor", "by", "device", "host to host", "launch", "x floor", "of matmul rate"),
        [
            (
                f"{len(one['prompts'])} x {one['prompts'][0]}",
                one["tokens"],
                f"{one['floor_s'] * 1e3:.2f}",
                one["bound_by"],
                f"{one['device_s'] * 1e3:.2f}",
                f"{one['host_to_host_s'] * 1e3:.2f}",
                f"{one['launch_s'] * 1e3:.2f}",
                f"{one['ratio']:.2f}",
                f"{one['share_of_matmul_rate']:.1%}",
            )
            for one in prefills
        ],
    )
    targets = [
        verdict(f"decode {shape[0]} x {shape[1]}, times floor", one["ratio"], TARGETS[shape], at_most=True)
        for shape, one in zip(bench.decodes, decodes, strict=True)
        if shape in TARGETS
    ]
    targets += [
        verdict(
            f"prefill {len(one['prompts'])} x {one['prompts'][0]}, share of the matrix product's rate",
            one["share_of_matmul_rate"],
            PREFILL_TARGET,
            at_most=False,
        )
        for one in prefills
        if one["tokens"] == prefills[-1]["tokens"]
    ]
    return {
        "ceilings": bench.ceilings,
        "decode": decodes,
        "prefill": prefills,
        "linear_choices": [
            choice._asdict()
            | {"seconds": {name: s if math.isfinite(s) else None for name, s in choice.seconds.items()}}
            for choice in bench.worker.linear_choices
        ],
        "targets": targets,
    }


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=20, help="times each is measured (default: %(default)s)")
    run_benchmark(options, benchmark)

"""The Triton kernels against what the GPU can do, measured in the same run, and the choices in them side by side.

* Decode attention: bytes that must move (keys and values of the contexts, once) over its time, as a share of the
  bandwidth of a large copy; beside the chosen tiling other tilings, numbers of splits and layouts of the cache.
* Prefill attention: FLOPs of the visible pairs over its time, as a share of a large matrix product's rate.
* Storing, norm, rotary embedding and activation: bytes over time.

Each is captured as a graph of calls that walk through more memory than the L2 cache holds, and timed on the device;
medians. For the model's heads and llama-3-8b's. On a CPU everything runs in Triton's interpreter, to show that it runs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from _gpu import captured, ceilings, device_seconds, parser, run_benchmark, table
from torch import Tensor

from fastserve.core.config import ModelConfig
from fastserve.core.presets import preset
from fastserve.runtime.kernels import AttentionMetadata

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Sizes:
    """What is measured; batches are of equal requests."""

    models: tuple[str, ...]
    """Besides the one asked for."""
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    compared: tuple[tuple[int, int], ...]
    """(batch, context) at which choices stand side by side."""
    splits: tuple[int, ...]
    prefills: tuple[tuple[int, int, int], ...]
    """(requests, tokens of each, tokens before them)."""
    rows: tuple[int, ...]
    touched_bytes: int
    """How much memory the calls of one graph walk through, at the least."""
    repeats: int


SIZES = {
    "cuda": Sizes(
        models=("llama-3-8b",),
        batches=(1, 4, 16, 64),
        contexts=(128, 512, 2048),
        compared=((1, 2048), (4, 512), (16, 512), (64, 512)),
        splits=(1, 2, 4, 8, 16),
        prefills=((1, 512, 0), (4, 512, 0), (1, 2048, 0), (1, 512, 2048), (1, 2048, 2048)),
        rows=(16, 64, 2048),
        touched_bytes=512 * 2**20,
        repeats=20,
    ),
    "cpu": Sizes(
        models=("llama-tiny",),
        batches=(2,),
        contexts=(150,),
        compared=((1, 150),),
        splits=(1, 2),
        prefills=((1, 20, 40),),
        rows=(1,),
        touched_bytes=1,
        repeats=1,
    ),
}


class Memory:
    """Random numbers on the device, of which every measurement takes a view."""

    def __init__(self, device: torch.device, dtype: torch.dtype, elements: int) -> None:
        self.device, self.dtype = device, dtype
        self.flat = torch.randn(elements, device=device, dtype=dtype)

    def cache(self, heads: ModelConfig, num_blocks: int, layers: int, order: tuple[int, ...]) -> Tensor:
        """`[num_blocks, layers, 2, block_size, num_kv_heads, head_dim]`, the dimensions in memory in `order`."""
        shape = (num_blocks, layers, 2, BLOCK_SIZE, heads.num_kv_heads, heads.head_dim)
        size = torch.Size(shape).numel()
        memory = self.flat[:size].view([shape[dim] for dim in order])
        return memory.permute([order.index(dim) for dim in range(len(order))])


LAYOUTS = {
    "blocks first": (0, 1, 2, 3, 4, 5),
    "layers first": (1, 2, 0, 3, 4, 5),
    "heads before tokens": (0, 1, 2, 4, 3, 5),
}


def requests(device: torch.device, count: int, query_len: int, context: int) -> AttentionMetadata:
    """`count` equal requests on scattered blocks."""
    width = -(-context // BLOCK_SIZE)
    return AttentionMetadata(
        num_decodes=count if query_len == 1 else 0,
        max_query_len=query_len,
        query_starts=torch.tensor([0, *accumulate([query_len] * count)], device=device),
        context_lens=torch.full((count,), context, device=device),
        block_tables=torch.randperm(count * width, device=device).view(count, width),
        host_query_lens=[],
        host_context_lens=[],
    )


class Bench:
    """The measurements."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(arguments.device)
        if self.device.type != "cuda":
            os.environ["TRITON_INTERPRET"] = "1"
        from fastserve.runtime.kernels import triton_kernels
        from fastserve.runtime.kernels.triton_kernels import decode_attention, prefill_attention, primitives

        self.kernels: ModuleType = triton_kernels
        self.decode, self.prefill, self.primitives = decode_attention, prefill_attention, primitives
        self.sizes = SIZES[self.device.type]
        self.dtype: torch.dtype = getattr(torch, arguments.dtype)
        self.models = [preset(name) for name in dict.fromkeys((arguments.model, *self.sizes.models))]
        self.ceilings = ceilings(self.device)
        most = max(self.layers(m, b * c) * b * c * self.token_bytes(m) for m, b, c in self.decodes())
        self.memory = Memory(self.device, self.dtype, most // self.dtype.itemsize + 2**20)

    def decodes(self) -> Iterator[tuple[ModelConfig, int, int]]:
        """Every model, batch and context, a context rounded up to whole blocks."""
        for model in self.models:
            for batch in self.sizes.batches:
                for context in self.sizes.contexts:
                    yield model, batch, -(-context // BLOCK_SIZE) * BLOCK_SIZE

    def token_bytes(self, model: ModelConfig) -> int:
        """Of a token's key and value in one layer."""
        return 2 * model.num_kv_heads * model.head_dim * self.dtype.itemsize

    def layers(self, model: ModelConfig, tokens: int) -> int:
        """Layers that one graph walks through."""
        return max(2, min(model.num_layers, -(-self.sizes.touched_bytes // (tokens * self.token_bytes(model)))))

    def seconds(self, calls: list[Callable[[], object]]) -> float:
        """Of one of `calls`, as a graph of them all."""

        def run() -> None:
            for call in calls:
                call()

        return device_seconds(captured(run, self.device), self.device, self.sizes.repeats) / len(calls)

    def query(self, tokens: int, model: ModelConfig) -> Tensor:
        """Of random numbers."""
        return torch.randn(tokens, model.num_heads, model.head_dim, device=self.device, dtype=self.dtype)

    def decode_seconds(
        self, model: ModelConfig, batch: int, context: int, layout: str = "blocks first", **choices: Any
    ) -> float:
        """Attention of one layer."""
        layers = self.layers(model, batch * context)
        metadata = requests(self.device, batch, 1, context)
        cache = self.memory.cache(model, metadata.block_tables.numel(), layers, LAYOUTS[layout])
        query = self.query(batch, model)
        out = torch.empty_like(query)
        scale = model.head_dim**-0.5

        def attend(layer: int) -> Callable[[], object]:
            return lambda: self.decode.attend_decodes(query, cache, layer, metadata, scale, out, **choices)

        return self.seconds([attend(layer) for layer in range(layers)])

    def decode_row(self, model: ModelConfig, batch: int, context: int, seconds: float) -> dict[str, Any]:
        """One measurement, beside the floor."""
        moved = batch * context * self.token_bytes(model)
        return {
            "model": model.name,
            "batch": batch,
            "context": context,
            "us": seconds * 1e6,
            "gb_per_s": moved / seconds / 1e9,
            "share": moved / seconds / self.ceilings["copy_bytes_per_s"],
        }

    def decode_attention(self) -> list[dict[str, Any]]:
        """What the engine runs."""
        rows = []
        for model, batch, context in self.decodes():
            splits = self.decode.split_count(
                batch, model.num_kv_heads, context, self.primitives.chip(self.device).multiprocessors
            )
            row = self.decode_row(model, batch, context, self.decode_seconds(model, batch, context))
            rows.append(row | {"splits": splits})
        show("decode attention", rows)
        return rows

    def decode_choices(self) -> list[dict[str, Any]]:
        """Other tilings, numbers of splits and layouts, one at a time."""
        tiling = self.decode.DecodeTiling
        tilings = [(32, 4, 3, True), (32, 4, 5, True), (64, 4, 3, True), (64, 4, 5, True)]
        alone = [(32, 4, 1, False), (32, 4, 3, False)]
        if self.device.type == "cpu":
            tilings, alone = tilings[:1], alone[:1]
        rows = []
        for model in self.models:
            possible = tilings + (alone if model.num_heads == model.num_kv_heads else [])
            choices: dict[str, dict[str, Any]] = {"chosen": {}}
            for n, warps, stages, use_dot in possible:
                name = f"{'dot' if use_dot else 'elementwise'} {n} tokens, {warps} warps, {stages} stages"
                choices[name] = {"tiling": tiling(n, warps, stages, use_dot)}
            choices |= {f"splits {count}": {"num_splits": count} for count in self.sizes.splits}
            choices |= {f"layout {name}": {"layout": name} for name in LAYOUTS}
            for batch, context in self.sizes.compared:
                for name, choice in choices.items():
                    seconds = self.decode_seconds(model, batch, context, **choice)
                    rows.append({"choice": name} | self.decode_row(model, batch, context, seconds))
        show("decode attention, choices", rows)
        return rows

    def prefill_seconds(self, model: ModelConfig, count: int, tokens: int, before: int, tiling: Any) -> float:
        """Attention of one layer."""
        metadata = requests(self.device, count, tokens, before + tokens)
        layers = min(8, self.layers(model, count * (before + tokens)))
        cache = self.memory.cache(model, metadata.block_tables.numel(), layers, LAYOUTS["blocks first"])
        query = self.query(count * tokens, model)
        out = torch.empty_like(query)
        scale = model.head_dim**-0.5

        def attend(layer: int) -> Callable[[], object]:
            return lambda: self.prefill.attend_prefills(query, cache, layer, metadata, scale, out, tiling=tiling)

        return self.seconds([attend(layer) for layer in range(layers)])

    def prefill_attention(self) -> list[dict[str, Any]]:
        """The chosen tiling and others."""
        tiling = self.prefill.PrefillTiling
        others = [tiling(128, 64, 8, 2), tiling(128, 128, 8, 3), tiling(64, 64, 4, 3)]
        if self.device.type == "cpu":
            others = [tiling(16, 16, 4, 1)]
        rows = []
        for model in self.models:
            for count, tokens, before in self.sizes.prefills:
                flops = 4 * model.num_heads * model.head_dim * count * (tokens * before + tokens * (tokens + 1) // 2)
                for choice in (None, *others):
                    seconds = self.prefill_seconds(model, count, tokens, before, choice)
                    rows.append(
                        {
                            "tiling": "chosen" if choice is None else str(choice).removeprefix("PrefillTiling"),
                            "model": model.name,
                            "requests": count,
                            "tokens": tokens,
                            "before": before,
                            "us": seconds * 1e6,
                            "tflops": flops / seconds / 1e12,
                            "share": flops / seconds / self.ceilings["matmul_flops_per_s"],
                        }
                    )
        show("prefill attention", rows)
        return rows

    def others(self) -> list[dict[str, Any]]:
        """Kernels that only move bytes."""
        rows = []
        for model in self.models:
            for count in self.sizes.rows:
                for name, moved, call in self.movers(model, count):
                    seconds = self.seconds([lambda index=index, call=call: call(index) for index in range(8)])  # type: ignore[misc]
                    bandwidth = moved * self.dtype.itemsize / seconds
                    rows.append(
                        {
                            "kernel": name,
                            "model": model.name,
                            "rows": count,
                            "us": seconds * 1e6,
                            "gb_per_s": bandwidth / 1e9,
                            "share": bandwidth / self.ceilings["copy_bytes_per_s"],
                        }
                    )
        show("other kernels", rows)
        return rows

    def movers(self, model: ModelConfig, rows: int) -> Iterator[tuple[str, int, Callable[[int], object]]]:
        """Name, elements read and written, and a call that takes one of 8 sets of buffers."""
        hidden, kernels = model.hidden_size, self.kernels
        kv = (rows, model.num_kv_heads, model.head_dim)
        heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
        wide = max(2 * hidden, heads, 2 * model.intermediate_size)
        buffers = torch.randn(8, rows * wide, device=self.device, dtype=self.dtype)
        weight = torch.ones(hidden, device=self.device, dtype=self.dtype)
        bias = torch.zeros_like(weight) if model.architecture == "opt" else None
        cache = self.memory.cache(model, -(-rows // BLOCK_SIZE), 8 if rows > 8 else 1, LAYOUTS["blocks first"])
        slots = torch.randperm(cache.shape[0] * BLOCK_SIZE, device=self.device)[:rows]

        def view(index: int, *shape: int) -> Tensor:
            return buffers[index][: torch.Size(shape).numel()].view(shape)

        def store(index: int) -> None:
            _, key, value = view(index, rows, heads // model.head_dim, model.head_dim).split(
                [model.num_heads, model.num_kv_heads, model.num_kv_heads], 1
            )
            kernels.store_kv(cache, index % cache.shape[1], key, value, slots)

        def norm(index: int) -> None:
            x, residual = view(index, 2, rows, hidden)
            kernels.add_norm(x, residual, weight, bias, 1e-5)

        yield "store_kv", 4 * torch.Size(kv).numel(), store
        yield "add_norm", 4 * rows * hidden, norm
        if model.architecture == "llama":
            cos = torch.ones(rows, 1, model.head_dim, device=self.device, dtype=self.dtype)
            sin = torch.zeros_like(cos)  # In place again and again: the numbers must not grow.
            query = (rows, model.num_heads, model.head_dim)
            inner = model.intermediate_size
            yield "rotate", 2 * rows * query[1] * query[2], lambda i: kernels.rotate(view(i, *query), cos, sin)
            yield "silu_mul", 3 * rows * inner, lambda i: kernels.silu_mul(view(i, rows, 2 * inner))


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """As a table."""
    print(title)
    digits = {"us": 1, "gb_per_s": 0, "tflops": 0, "share": 3}
    header = list(rows[0])
    table(header, [[f"{row[k]:.{digits[k]}f}" if k in digits else row[k] for k in header] for row in rows])


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """All of them."""
    torch.manual_seed(0)
    bench = Bench(arguments)
    return {
        "ceilings": bench.ceilings,
        "decode_attention": bench.decode_attention(),
        "decode_choices": bench.decode_choices(),
        "prefill_attention": bench.prefill_attention(),
        "other_kernels": bench.others(),
    }


if __name__ == "__main__":
    run_benchmark(parser(__doc__), benchmark)

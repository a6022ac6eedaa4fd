"""Compile the Triton kernels for a GPU that is not there, as the launching functions would, and print what they need.

Run as a program, not under TRITON_INTERPRET: `compile_ahead.py ARCH [PRESET ...]` prints a JSON list, one object each.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastserve.core.config import ModelConfig
from fastserve.core.presets import PRESETS, preset
from fastserve.runtime.kernels import AttentionMetadata, triton_kernels
from fastserve.runtime.kernels.triton_kernels import decode_attention, prefill_attention, skinny_linear
from fastserve.runtime.kernels.triton_kernels.primitives import Chip

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

ASYNC_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x[0-9a-f]+)")
"""With the bytes that each thread copies to shared memory while it goes on."""


class AbsentGPU:
    """What Triton asks of a driver until it launches."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def tool(name: str) -> str:
    """A program of Triton's package."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, bytes of stack a thread (where spilled registers go) and of local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return {"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"]}


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout


class Compiler:
    """Calls launching functions with tensors that have no memory, and keeps each kernel they would have launched."""

    def __init__(self, arch: int) -> None:
        triton.runtime.driver.set_active(AbsentGPU(arch))
        self.kernels: dict[int, tuple[str, Any]] = {}
        self.case = ""
        self.chip = Chip(multiprocessors=132, major=arch // 10)
        self.patches = ExitStack()

    def __enter__(self) -> Compiler:
        launch = JITFunction.run

        @functools.wraps(launch)
        def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            kernel = launch(function, *args, grid=grid, warmup=True, **options)
            self.kernels.setdefault(id(kernel), (self.case, kernel))

        self.patches.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        for module in (decode_attention, prefill_attention):
            self.patches.enter_context(mock.patch.object(module, "chip", return_value=self.chip))
        return self

    def __exit__(self, *_: object) -> None:
        self.patches.close()

    def report(self, sass: bool = False) -> list[dict[str, Any]]:
        rows = []
        for case, kernel in self.kernels.values():
            row = {"case": case, "kernel": kernel.metadata.name, "shared": kernel.metadata.shared}
            row |= resources(kernel.asm["cubin"])
            row["async_copy_bytes"] = sorted({int(size, 16) for size in ASYNC_COPY.findall(kernel.asm["ptx"])})
            if sass:
                row["sass"], row["ptx"] = disassemble(kernel.asm["cubin"]), kernel.asm["ptx"]
            rows.append(row)
        return rows


def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def metadata(num_decodes: int, num_prefills: int, width: int) -> AttentionMetadata:
    count = num_decodes + num_prefills
    return AttentionMetadata(
        num_decodes=num_decodes,
        max_query_len=512 if num_prefills else 1,
        query_starts=empty(count + 1),
        context_lens=empty(count),
        block_tables=empty(count, width),
        host_query_lens=[],
        host_context_lens=[],
    )


def attend(config: ModelConfig, dtype: torch.dtype, decodes: int, prefills: int, **choices: Any) -> None:
    """Attention of the model's heads over a cache of 16-token blocks."""
    tokens, block_size, layers = decodes + 512 * prefills, 16, config.num_layers
    cache = empty(2000, layers, 2, block_size, config.num_kv_heads, config.head_dim, dtype=dtype)
    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    fused = empty(tokens, width, dtype=dtype).view(tokens, -1, config.head_dim)
    query, key, value = fused.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], 1)
    batch = metadata(decodes, prefills, -(-config.max_model_len // block_size))
    scale = config.head_dim**-0.5
    if not choices:
        triton_kernels.store_kv(cache, 3, key, value, empty(tokens))
        triton_kernels.paged_attention(query, cache, 3, batch, scale)
    else:
        decode_attention.attend_decodes(query, cache, 3, batch, scale, torch.empty_like(query), **choices)


def compile_preset(config: ModelConfig, dtype: torch.dtype) -> None:
    """Every kernel that serving the model launches."""
    hidden, rows = config.hidden_size, 17
    attend(config, dtype, 1, 0)
    attend(config, dtype, 600, 1)
    x, weight = empty(rows, hidden, dtype=dtype), empty(hidden, dtype=dtype)
    is_llama = config.architecture == "llama"
    for residual in (None, x):
        triton_kernels.add_norm(x, residual, weight, None if is_llama else weight, 1e-5)
    if is_llama:
        angles = empty(rows, 1, config.head_dim, dtype=dtype)
        for heads in (config.num_heads, config.num_kv_heads):
            triton_kernels.rotate(empty(rows, heads, config.head_dim, dtype=dtype), angles, angles)
        triton_kernels.silu_mul(empty(rows, 2 * config.intermediate_size, dtype=dtype))
    tables = empty(rows, 128)
    triton_kernels.load_decodes(empty(rows, 130), *(empty(rows) for _ in range(4)), tables, 16)
    triton_kernels.exchange(empty(rows), empty(64))


def compile_linears(config: ModelConfig, dtype: torch.dtype, multiprocessors: int) -> None:
    """Every way that a decode batch's linear layers may be computed by our kernel."""
    hidden, inner = config.hidden_size, config.intermediate_size
    for num_columns, num_inner in ((3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)):
        weight, bias = empty(num_columns, num_inner, dtype=dtype), empty(num_columns, dtype=dtype)
        for tiling in skinny_linear.tilings(num_columns, num_inner, multiprocessors):
            workspace = skinny_linear.Workspace(weight.device, num_columns, tiling.num_splits)
            for rows in (1, 16, 17, 64):
                for floor in (0.0, -math.inf):
                    x = empty(rows, num_inner, dtype=dtype)
                    skinny_linear.skinny_linear(x, weight, bias, floor, tiling, workspace)


def compile_odd_batches(config: ModelConfig, dtype: torch.dtype) -> None:
    """Batches of all sorts for one model, as serving meets them: other sizes, widths, layers and alignments."""
    cache = empty(2000, config.num_layers, 2, 16, config.num_kv_heads, config.head_dim, dtype=dtype)
    for count, width, layer in ((300, 1, 0), (304, 16, 1), (305, 33, 16), (401, 100, 7)):
        packed = empty(count * (width + 3) + 2)
        batch = AttentionMetadata(
            num_decodes=count - 1,
            max_query_len=count,
            query_starts=packed[1 : count + 2],
            context_lens=packed[count + 1 : 2 * count + 1],
            block_tables=packed[2 * count + 1 : 2 * count + 1 + count * width].view(count, width),
            host_query_lens=[],
            host_context_lens=[],
        )
        query = empty(2 * count - 1, config.num_heads, config.head_dim, dtype=dtype)
        key = empty(2 * count - 1, config.num_kv_heads, config.head_dim, dtype=dtype)
        triton_kernels.paged_attention(query, cache, layer, batch, 0.1)
        triton_kernels.store_kv(cache, layer, key, key, packed[1 : 2 * count])
        triton_kernels.load_decodes(
            packed[1 : 1 + count * (width + 2)].view(count, width + 2),
            *(packed[i : i + count] for i in range(4)),
            batch.block_tables,
            16,
        )
        triton_kernels.exchange(packed[1:count], packed[2:count])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", type=int)
    parser.add_argument("presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--sass", action="store_true")
    parser.add_argument("--odd-batches", action="store_true", help="compile what batches of all sorts need, instead")
    arguments = parser.parse_args()
    with Compiler(arguments.arch) as compiler:
        for name in arguments.presets:
            for dtype in arguments.dtypes:
                compiler.case = f"{name} {dtype}"
                if DTYPES[dtype] in skinny_linear.DTYPES and not arguments.odd_batches:
                    compile_linears(preset(name), DTYPES[dtype], compiler.chip.multiprocessors)
                (compile_odd_batches if arguments.odd_batches else compile_preset)(preset(name), DTYPES[dtype])
    print(json.dumps(compiler.report(arguments.sass)))


if __name__ == "__main__":
    main()

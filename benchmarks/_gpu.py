"""What the benchmarks for a GPU share: ceilings measured in the same run, times on the device, a table and a file.

Everything runs on a CPU too, on tiny sizes, to show that it works; the numbers then say nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastserve import LLM
from fastserve.core.config import ModelConfig, dtype_bytes
from fastserve.core.errors import ConfigError, FastServeError
from fastserve.core.files import check_writable
from fastserve.runtime.kernels.cuda_graph import capture
from fastserve.runtime.worker import Worker
from harness.analysis.files import write_json
from harness.run.meta import environment_meta

_WARM_UP = 3
_SPIN_CYCLES_PER_S = 2e9
"""A GPU's clock, at the most: what the device is kept busy with must not end early."""


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options that all have: --device, --model, --dtype, --out."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda", help="cuda, or cpu to try this out (default: %(default)s)")
    options.add_argument("--model", help="preset (default: opt-13b, on a CPU opt-tiny)")
    options.add_argument("--dtype", help="float16, bfloat16 or float32 (default: float16, on a CPU float32)")
    options.add_argument("--out", type=Path, help="JSON file to write")
    options.set_defaults(**defaults)
    return options


def run_benchmark(options: argparse.ArgumentParser, benchmark: Callable[[argparse.Namespace], dict[str, Any]]) -> None:
    """Parse the command line, run `benchmark` and write what it returns, with `meta`, to --out.

    Bad input ends it with one line on stderr and status 2.
    """
    arguments = options.parse_args()
    try:
        device = torch.device(arguments.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"--device {arguments.device}: torch finds no GPU; try this out with --device cpu")
        on_gpu = device.type == "cuda"
        arguments.model = arguments.model or ("opt-13b" if on_gpu else "opt-tiny")
        arguments.dtype = arguments.dtype or ("float16" if on_gpu else "float32")
        dtype_bytes(arguments.dtype)
        if arguments.out is not None:
            check_writable(arguments.out)
        results = benchmark(arguments)
        if arguments.out is not None:
            named = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
            content = {"meta": {**environment_meta(), "arguments": named}, **results}
            write_json(content, arguments.out)
            print(f"wrote {arguments.out}")
    except FastServeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def device_seconds(
    launch: Callable[[], Callable[[], object] | None], device: torch.device, repeats: int, ahead_s: float = 1e-3
) -> float:
    """Median seconds that the device takes for what `launch` starts and, if it returns a function, that waits for.

    Before each, the device is kept busy for `ahead_s`, in which the host can put everything into its queue: what is
    measured is the device alone, unless launching takes longer than that. On a CPU, the time until all is done.
    """
    for _ in range(_WARM_UP):
        _device_seconds(launch, device, ahead_s)
    return statistics.median(_device_seconds(launch, device, ahead_s) for _ in range(repeats))


def _device_seconds(launch: Callable[[], Callable[[], object] | None], device: torch.device, ahead_s: float) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        finish = launch()
        if finish is not None:
            finish()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(ahead_s * _SPIN_CYCLES_PER_S))
    start.record()
    finish = launch()
    end.record()
    if finish is not None:
        finish()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """`run` as a CUDA graph to be replayed; on a CPU as it is."""
    if device.type != "cuda":
        return lambda: drop(run())
    graph, _ = capture(run)
    return graph.replay


def drop(_: object) -> None:
    """What a call returned is not needed."""


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy on the device, bytes read and bytes written both counted."""
    size = 4 * 2**30 if device.type == "cuda" else 32 * 2**20
    source = torch.empty(size // 4, device=device).normal_()
    target = torch.empty_like(source)
    seconds = device_seconds(lambda: drop(target.copy_(source)), device, 30)
    return 2 * size / seconds


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a square matrix product of random numbers: of 8192 in bfloat16 on a GPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = device_seconds(lambda: drop(torch.mm(a, b, out=out)), device, 30)
    return 2 * size**3 / seconds


def ceilings(device: torch.device) -> dict[str, float]:
    """Both, with what they took given back, and printed."""
    measured = {"copy_bytes_per_s": copy_bandwidth(device), "matmul_flops_per_s": matmul_rate(device)}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    print(
        f"ceilings of this run: copy {measured['copy_bytes_per_s'] / 1e12:.3f} TB/s (read + written), "
        f"matrix product {measured['matmul_flops_per_s'] / 1e12:.1f} TFLOP/s\n",
        flush=True,
    )
    return measured


def layer_parameters(config: ModelConfig) -> int:
    """Weights of the layers: no table of tokens or positions, no LM head."""
    tables = config.vocab_size * (1 if config.tie_word_embeddings else 2)
    if config.architecture == "opt":
        tables += config.max_model_len
    return config.num_parameters() - tables * config.hidden_size


def read_weights_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of weights that every iteration must read: the layers and the LM head."""
    return (layer_parameters(config) + config.vocab_size * config.hidden_size) * dtype_bytes(dtype)


def engine_on(worker: Worker, arguments: argparse.Namespace, policy: str, max_batch_size: int) -> LLM:
    """An engine of the model that the options name, on an existing worker of it.

    The profile is for the policy that needs one; how fast our iterations are does not depend on it.
    """
    return LLM(
        arguments.model,
        load_format="dummy",
        policy=policy,
        device=arguments.device,
        dtype=arguments.dtype,
        block_size=worker.block_size,
        max_batch_size=max_batch_size,
        profile="a100-80g/opt-13b-tp1-swifttransformer",
        worker=worker,
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table, columns to the right, followed by an empty line."""
    texts = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print(flush=True)


def verdict(name: str, value: float, target: float, *, at_most: bool) -> dict[str, Any]:
    """A target and whether it was met, printed."""
    met = value <= target if at_most else value >= target
    bound = "at most" if at_most else "at least"
    print(f"{name}: {value:.3g}, target {bound} {target:g}: {'met' if met else 'MISSED'}", flush=True)
    return {"name": name, "value": value, "target": target, "at_most": at_most, "met": met}

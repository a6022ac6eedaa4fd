"""Choose the kernel of each linear layer in decode batches by measurement: the library's, or ours.

A decode step mostly reads weights. What share of the memory's bandwidth a kernel reaches depends on the shape, the GPU
and the library's version, so it is measured when a model is loaded.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastserve.core.errors import ConfigError
from fastserve.runtime.kernels.cuda_graph import capture
from fastserve.runtime.models.decoder import DecoderModel
from fastserve.runtime.models.layers import Linear

if TYPE_CHECKING:
    from fastserve.runtime.kernels.triton_kernels.skinny_linear import Tiling, Workspace

_REPEATS = 5
_MOST_LAYERS = 16
"""Layers of a shape in one measurement: together too large for the L2 cache."""
_TOLERANCE = 0.02
"""Relative distance from the library's result beyond which a kernel is wrong; below, it rounds differently."""


class LinearChoice(NamedTuple):
    """The measurement of linear layers of one shape, and the choice."""

    num_columns: int
    num_inner: int
    rows: int
    """The largest batch of this choice; it holds down to the next smaller choice's batch."""
    chosen: str
    seconds: dict[str, float]
    """Seconds a layer of each candidate; infinite if its result is wrong or it does not run on this device."""


def tune_linears(model: DecoderModel, batch_sizes: Sequence[int]) -> list[LinearChoice]:
    """Let every linear layer compute batches of these sizes with the fastest kernel; returns the measurements.

    Does nothing for types that our kernels do not support, or with FASTSERVE_LINEARS=library in the environment (the
    default is "measured").
    """
    setting = os.environ.get("FASTSERVE_LINEARS", "measured")
    if setting not in ("measured", "library"):
        raise ConfigError(f"FASTSERVE_LINEARS={setting!r}; known: measured, library")
    from fastserve.runtime.kernels.triton_kernels import skinny_linear as skinny
    from fastserve.runtime.kernels.triton_kernels.primitives import chip

    if setting == "library" or model.dtype not in skinny.DTYPES:
        return []
    groups: dict[tuple[int, int, bool, bool], list[Linear]] = {}
    for module in model.modules():
        if isinstance(module, Linear) and module.weight is not None:
            key = (*module.weight.shape, module.bias is not None, module.relu)
            groups.setdefault(key, []).append(module)
    if not groups:  # On a CPU, weights are packed for its library.
        return []
    device = model.device
    tilings = {key: skinny.tilings(key[0], key[1], chip(device).multiprocessors) for key in groups}
    workspace = skinny.Workspace(
        device,
        max(columns for columns, _, _, _ in groups),
        max((one.num_splits for found in tilings.values() for one in found), default=1),
    )
    choices = []
    for tile in skinny.ROW_TILES:
        sizes = [size for size in batch_sizes if size <= skinny.ROW_TILES[-1] and skinny.row_tile(size) == tile]
        if not sizes:
            continue
        for key, linears in groups.items():
            choice, tiling = _choose(linears, max(sizes), tilings[key], workspace)
            choices.append(choice)
            if tiling is None:
                continue
            for linear in linears:
                linear.few_rows |= dict.fromkeys(sizes, _ours(linear, tiling, workspace))
    return choices


@torch.inference_mode()
def _choose(
    linears: Sequence[Linear], rows: int, tilings: Sequence[Tiling], workspace: Workspace
) -> tuple[LinearChoice, Tiling | None]:
    """Measure the candidates for one shape; the tiling is None if the library is the fastest."""
    from triton.runtime.errors import OutOfResources

    weight = linears[0].weight
    assert weight is not None
    linears = linears[:_MOST_LAYERS]

    def random_input() -> Tensor:
        return torch.randn(rows, weight.shape[1], device=weight.device).to(weight.dtype)

    x = random_input()
    seconds = {"library": _seconds_a_call([partial(linear.library, x) for linear in linears])}
    candidates: dict[str, Tiling] = {}
    for tiling in tilings:
        name = f"{tiling.block_n}x{tiling.block_k}, {tiling.num_splits} splits"
        ours = [_ours(linear, tiling, workspace) for linear in linears]
        other = random_input()  # A new input each time: freed memory holds right results for earlier inputs.
        expected = [linear.library(other) for linear in linears]
        try:
            agrees = all(_agree(compute(other), wanted) for compute, wanted in zip(ours, expected, strict=True))
        except OutOfResources:  # This device has too little shared memory or too few registers.
            agrees = False
        seconds[name] = _seconds_a_call([partial(compute, x) for compute in ours]) if agrees else math.inf
        candidates[name] = tiling
    chosen = min(seconds, key=seconds.__getitem__)
    num_columns, num_inner = weight.shape
    return LinearChoice(num_columns, num_inner, rows, chosen, seconds), candidates.get(chosen)


def _ours(linear: Linear, tiling: Tiling, workspace: Workspace) -> Callable[[Tensor], Tensor]:
    """The layer computed with our kernel."""
    from fastserve.runtime.kernels.triton_kernels.skinny_linear import skinny_linear

    weight, bias = linear.weight, linear.bias
    assert weight is not None
    return partial(
        skinny_linear,
        weight=weight,
        bias=weight.new_zeros(weight.shape[0]) if bias is None else bias,
        floor=0.0 if linear.relu else -math.inf,
        tiling=tiling,
        workspace=workspace,
    )


def _agree(result: Tensor, expected: Tensor) -> bool:
    difference = (result.float() - expected.float()).norm()
    return bool(difference <= _TOLERANCE * expected.float().norm())


def _seconds_a_call(calls: Sequence[Callable[[], Tensor]]) -> float:
    """Median seconds of one of these calls, made one after the other; on a GPU in a CUDA graph, as in a decode step."""

    def run() -> None:
        for call in calls:
            call()

    if not torch.cuda.is_available():
        run()
        begun = time.perf_counter()
        run()
        return (time.perf_counter() - begun) / len(calls)
    graph, _ = capture(run)
    graph.replay()
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times) / len(calls)

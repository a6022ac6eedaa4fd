"""Capture CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def capture(run: Callable[[], Result], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Capture `run`, without autograd, as a CUDA graph; returns it with the result that each replay overwrites.

    Runs once before the capture, to compile kernels and to let libraries allocate memory, which cannot be captured.
    `pool` is the memory pool of a graph that is never replayed at the same time.
    """
    with torch.inference_mode():
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = run()
    return graph, result

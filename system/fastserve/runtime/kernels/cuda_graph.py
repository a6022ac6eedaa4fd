"""Capturing what a GPU runs over and over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def capture(run: Callable[[], Result], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """`run`, without autograd, as a CUDA graph, and the result that each replay writes anew.

    It runs once before: that compiles kernels, and lets libraries allocate what they need, neither of which can be
    captured. `pool` is the memory pool of another graph that is never replayed at the same time.
    """
    with torch.inference_mode():
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = run()
    return graph, result

"""A set of kernels and where it runs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastserve.runtime.kernels import Kernels
from support.devices import INTERPRETED, NEEDS_GPU, NO_INTERPRETER


@dataclass(frozen=True)
class Target:
    """A set of kernels and where it runs."""

    kernels: Kernels
    device: torch.device

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        """What host and device exchange: page-locked memory where there is a GPU."""
        return tensor.pin_memory() if self.is_gpu else tensor


def on_gpu(*values: Any) -> Any:
    """A parameter for machines with a GPU."""
    return pytest.param(*values, marks=NEEDS_GPU)


def make_target(name: str) -> Target:
    kernels, device = name.split("-")
    if kernels == "triton" and device == "cpu" and not INTERPRETED:
        pytest.skip(NO_INTERPRETER)
    if kernels == "triton" and device == "cuda" and INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 would test the interpreter and not the GPU")
    return Target(importlib.import_module(f"fastserve.runtime.kernels.{kernels}_kernels"), torch.device(device))

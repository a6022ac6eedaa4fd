"""A set of kernels and where it runs."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastserve.kernels import Kernels
from support.devices import NEEDS_GPU

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # set by tests/conftest.py


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
        pytest.skip("Triton's interpreter is off where there is a GPU's driver: set TRITON_INTERPRET=1 for it")
    if kernels == "triton" and device == "cuda" and INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 would test the interpreter and not the GPU")
    return Target(importlib.import_module(f"fastserve.kernels.{kernels}_kernels"), torch.device(device))

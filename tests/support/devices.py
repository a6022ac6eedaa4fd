"""Tests that run on a CPU, and on a GPU where there is one."""

import os

import pytest
import torch

NEEDS_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
)
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # set by tests/conftest.py
NO_INTERPRETER = "Triton's interpreter is off where there is a GPU's driver: set TRITON_INTERPRET=1 for it"
NEEDS_INTERPRETER = pytest.mark.skipif(not INTERPRETED, reason=NO_INTERPRETER)
TRITON_DEVICES = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=NEEDS_INTERPRETER), pytest.param("cuda", marks=NEEDS_GPU)]
)
"""For what runs Triton's kernels on either."""

"""Tests that run on a CPU, and on a GPU where there is one."""

import os

import pytest
import torch

NEEDS_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
)
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
NEEDS_INTERPRETER = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",  # tests/conftest.py sets it
    reason="Triton's interpreter is off where there is a GPU's driver: set TRITON_INTERPRET=1 for it",
)
TRITON_DEVICES = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=NEEDS_INTERPRETER), pytest.param("cuda", marks=NEEDS_GPU)]
)
"""For what runs Triton's kernels on either."""

"""What the kernels need on GPUs that are not here: compiled for an A100 and an H100 or H200, as launching would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("compile_ahead.py")
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes that a program may have."""
CASES = [
    (90, "bfloat16", ["opt-13b", "llama-3-8b", "opt-2.7b", "opt-125m"]),
    (90, "float16", ["opt-13b"]),
    (90, "float32", ["llama-tiny"]),
    (80, "bfloat16", ["opt-13b", "opt-125m"]),
]
"""Each group size and head dimension; `compile_ahead.py 90` compiles all presets."""


def compiled(*arguments: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, str(PROGRAM), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return list(json.loads(result.stdout))


@pytest.mark.parametrize(
    ("arch", "dtype", "models"), CASES, ids=lambda value: "" if isinstance(value, list) else str(value)
)
def test_kernels_fit_the_chip(arch: int, dtype: str, models: list[str]) -> None:
    kernels = compiled(str(arch), *models, "--dtypes", dtype)
    names = {kernel["kernel"] for kernel in kernels}
    assert {"_store_kernel", "_decode_kernel", "_combine_kernel", "_prefill_kernel", "_add_norm_kernel"} < names
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY[arch], kernel
        if dtype == "float32":  # Of no use for serving, and not made for speed.
            continue
        assert kernel["stack"] == 0, f"spilled registers: {kernel}"
        if kernel["kernel"] == "_skinny_linear":
            assert kernel["async_copy_bytes"] == [16], kernel
            assert kernel["shared"] <= SHARED_MEMORY[arch] // (2 if arch == 90 else 1), f"only one fits: {kernel}"
        if kernel["kernel"] in ("_decode_kernel", "_prefill_kernel"):  # keys and values, and block ids
            assert set(kernel["async_copy_bytes"]) <= {16, 8, 4}, kernel
            assert 16 in kernel["async_copy_bytes"], kernel
        if kernel["kernel"] == "_decode_kernel" and arch == 90:
            assert kernel["registers"] <= 96, f"fewer than five programs fit a multiprocessor: {kernel}"


def test_serving_compiles_nothing_anew() -> None:
    """Batches of any size, with any tables, run one version of each kernel: a compilation would stall them all."""
    kernels = compiled("90", "opt-13b", "--dtypes", "bfloat16", "--odd-batches")
    assert set(Counter(kernel["kernel"] for kernel in kernels).values()) == {1}

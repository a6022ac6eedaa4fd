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
MODELS = {
    "bfloat16": ["opt-13b", "llama-3-8b", "opt-2.7b", "opt-125m"],
    "float16": ["opt-13b"],
    "float32": ["opt-13b", "llama-tiny"],
}
"""Group sizes and head dimensions that differ; `compile_ahead.py 90` does all presets."""


def compiled(*arguments: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, str(PROGRAM), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return list(json.loads(result.stdout))


@pytest.mark.parametrize("dtype", MODELS)
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_kernels_fit_the_chip(arch: int, dtype: str) -> None:
    kernels = compiled(str(arch), *MODELS[dtype], "--dtypes", dtype)
    names = {kernel["kernel"] for kernel in kernels}
    assert {"_store_kernel", "_decode_kernel", "_combine_kernel", "_prefill_kernel", "_add_norm_kernel"} < names
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY[arch], kernel
        if dtype != "float32":  # where its products are not made for
            assert kernel["stack"] == 0, f"spilled registers: {kernel}"


def test_serving_compiles_nothing_anew() -> None:
    """Batches of any size, with any tables, run one version of each kernel: a compilation would stall them all."""
    kernels = compiled("90", "opt-13b", "--dtypes", "bfloat16", "--odd-batches")
    assert set(Counter(kernel["kernel"] for kernel in kernels).values()) == {1}

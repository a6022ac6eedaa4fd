"""The sets of kernels under test, each where it can run."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import pytest
import torch
from targets import Target, make_target, on_gpu


@pytest.fixture(params=["torch-cpu", "triton-cpu", on_gpu("torch-cuda"), on_gpu("triton-cuda")])
def target(request: pytest.FixtureRequest) -> Target:
    return make_target(request.param)


@pytest.fixture(params=["triton-cpu", on_gpu("triton-cuda")])
def triton_target(request: pytest.FixtureRequest) -> Target:
    """For what only the Triton set has."""
    return make_target(request.param)


@pytest.fixture(params=[on_gpu("torch-cuda"), on_gpu("triton-cuda")])
def gpu_target(request: pytest.FixtureRequest) -> Target:
    """For what is too large for a CPU."""
    return make_target(request.param)


@pytest.fixture(autouse=True)
def seed() -> int:
    """A fresh one each time, shown when the test fails."""
    seed = secrets.randbits(32)
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)
    return seed


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the kernels allocate is full of NaN until they write it."""

    def full_of_nan(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocated(*args: Any, **options: Any) -> torch.Tensor:
            tensor = allocate(*args, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocated

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, full_of_nan(getattr(torch, name)))

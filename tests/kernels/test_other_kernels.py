"""Norms, rotary embedding, activation and the exchange with the host, against float64 and plain Python."""

from __future__ import annotations

import pytest
import torch
from paged import TOLERANCE, relative_error
from targets import Target

from fastserve.core.presets import PRESETS

HIDDEN = sorted({config.hidden_size for config in PRESETS.values()})
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.mark.usefixtures("poisoned")
@DTYPES
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("with_bias", [True, False], ids=["layer norm", "RMS norm"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "no residual"])
def test_add_norm(target: Target, hidden: int, dtype: torch.dtype, with_bias: bool, with_residual: bool) -> None:
    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=target.device) * 2 + 0.5).to(dtype)

    x, residual, weight, bias = draw(3, hidden), draw(3, hidden), draw(hidden), draw(hidden)
    total = (x + residual) if with_residual else x.clone()
    wide = total.double()
    if with_bias:
        wanted = torch.nn.functional.layer_norm(wide, [hidden], weight.double(), bias.double(), 1e-5)
    else:
        wanted = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    kept = residual.clone()
    normed, summed = target.kernels.add_norm(
        x, residual if with_residual else None, weight, bias if with_bias else None, 1e-5
    )
    assert normed.dtype == summed.dtype == dtype
    assert relative_error(summed, total.double()) < TOLERANCE[dtype]
    assert relative_error(normed, wanted) < TOLERANCE[dtype]
    assert torch.equal(residual, kept)


@DTYPES
@pytest.mark.parametrize(("heads", "head_dim"), [(4, 16), (12, 64), (5, 80), (32, 128)])
def test_rotate(target: Target, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    fused = torch.randn(5, heads + 3, head_dim, device=target.device).to(dtype)
    x, rest = fused[:, :heads], fused[:, heads:].clone()
    angles = torch.rand(5, 1, head_dim // 2, device=target.device, dtype=torch.float64) * 6
    cos = torch.cat([angles.cos(), angles.cos()], -1).to(dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], -1).to(dtype)
    low, high = x.double().chunk(2, -1)
    turned = low * cos.double().chunk(2, -1)[0] + high * sin.double().chunk(2, -1)[0]
    other = high * cos.double().chunk(2, -1)[1] + low * sin.double().chunk(2, -1)[1]
    result = target.kernels.rotate(x, cos, sin)
    assert relative_error(result, torch.cat([turned, other], -1)) < TOLERANCE[dtype]
    assert torch.equal(fused[:, heads:], rest)


@pytest.mark.usefixtures("poisoned")
@DTYPES
@pytest.mark.parametrize("inner", [24, 128, 2048, 11_008])
def test_silu_mul(target: Target, inner: int, dtype: torch.dtype) -> None:
    gate_up = torch.randn(3, 2 * inner, device=target.device).mul(3).to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    result = target.kernels.silu_mul(gate_up.clone())
    assert result.dtype == dtype
    assert relative_error(result, gate / (1 + (-gate).exp()) * up) < TOLERANCE[dtype]


@pytest.mark.parametrize("block_size", [16, 5])
@pytest.mark.parametrize("max_blocks", [3, 200])
def test_load_decodes(target: Target, block_size: int, max_blocks: int) -> None:
    positions = [0, block_size - 1, block_size, max_blocks * block_size - 1, block_size + 3]
    rows = len(positions)
    packed = target.buffer(torch.randint(0, 2**40, (rows, 2 + max_blocks)))
    packed[:, 2:] %= 10_000
    packed[:, 1] = torch.tensor(positions)
    token_ids, places, slots, contexts = torch.full((4, rows), -1, device=target.device).unbind(0)
    tables = torch.full((rows, max_blocks + 1), -1, device=target.device)[:, :max_blocks]
    target.kernels.load_decodes(packed, token_ids, places, slots, contexts, tables, block_size)
    assert token_ids.tolist() == packed[:, 0].tolist()
    assert places.tolist() == positions
    assert contexts.tolist() == [position + 1 for position in positions]
    blocks = [packed[row, 2 + position // block_size].item() for row, position in enumerate(positions)]
    wanted = [block * block_size + p % block_size for block, p in zip(blocks, positions, strict=True)]
    assert slots.tolist() == wanted
    for row, position in enumerate(positions):
        used = position // block_size + 1
        assert tables[row, :used].tolist() == packed[row, 2 : 2 + used].tolist()


@pytest.mark.parametrize("to_host", [True, False], ids=["to host", "from host"])
@pytest.mark.parametrize("count", [1, 7, 256, 300])
def test_exchange(target: Target, count: int, to_host: bool) -> None:
    source, destination = torch.randint(0, 2**40, (count,)), torch.full((count + 2,), -1)
    if to_host:
        source, destination = source.to(target.device), target.buffer(destination)
    else:
        source, destination = target.buffer(source), destination.to(target.device)
    target.kernels.exchange(source, destination)
    if target.is_gpu:
        torch.cuda.synchronize()
    assert destination.tolist() == [*source.tolist(), -1, -1]

"""Iteration time of one pipeline stage from the model's and the GPU's sizes, where nothing was measured.

Memory traffic goes at peak bandwidth and arithmetic at peak FLOP/s, each times a factor of the engine; fixed overheads
come on top. The factors and overheads (`Calibration`) are fitted to measurements, in `fastserve.latency.calibration`.
Assumed, for fp16 weights and cache, with layers and their weights divided evenly over all GPUs:

- Every iteration reads the stage's weights and the LM head once. The LM head counts as a share of every stage.
- An iteration costs a fixed time a layer, a fixed time of the host, and more of the host where it drives several GPUs.
- Decode reads the KV cache of every context token: of KV heads, so grouped-query attention reads less.
- A decode request hides part of its arithmetic behind the reading, up to `LARGE_BATCH`; beyond, it costs as much as a
  prompt token. The measured fits of both engines behave so.
- A prompt token costs 2 FLOPs a weight of the layers, and 4 FLOPs a layer, hidden unit and token attended to, the
  causal half not deducted.
- Tensor parallelism reduces hidden-size activations twice a layer. Prompts pay the measured time (`_ALL_REDUCE`),
  intercept and slope, though it was fitted from 1 MiB up. The messages of decode lie below, where measurements are
  noisy: its intercept is a fitted time for each doubling of the GPUs, its slope the measured one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from fastserve.core.checks import require_int
from fastserve.core.config import ModelConfig, dtype_bytes
from fastserve.core.errors import ConfigError
from fastserve.latency.fitted import DecodeFit, FittedLatency, PrefillFit
from fastserve.latency.gpus import RatedGpu

LARGE_BATCH = 95
"""Decode batch from which requests cost their arithmetic in full; the threshold of the measured fits."""

_NUMBER = dtype_bytes("float16")
_ALL_REDUCE = {2: (45e-6, 6.13e-6), 4: (60e-6, 8.46e-6), 8: (81e-6, 9.85e-6)}
"""Seconds, and seconds a MiB, of an all-reduce over this many A100s of a node with NVLink: medians of the profiles
published with Vidur (MLSys'24, MIT), from 1 MiB up. Between the sizes: linear in the logarithm."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What an engine makes of a GPU: times as multiples of those at peak (1 / efficiency), and overheads in seconds."""

    weight_read: float = 0.0
    layer_overhead_s: float = 0.0
    small_all_reduce_s: float = 0.0
    """Of one all-reduce of decode, for each doubling of the GPUs."""
    kv_read: float = 0.0
    decode_flops: float = 0.0
    """Of a decode request in a batch below `LARGE_BATCH`; below 1 where the reading hides part of it."""
    prefill_flops: float = 0.0
    attention_flops: float = 0.0
    step_overhead_s: float = 0.0
    """Of the host, for each iteration of a stage."""
    dispatch_overhead_s: float = 0.0
    """Of the host, for each iteration of a stage, where the model is on several GPUs."""


def predict(
    config: ModelConfig,
    gpu: RatedGpu,
    calibration: Calibration,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
) -> FittedLatency:
    """Coefficients of one stage of `config` in fp16, linear in the calibration; ConfigError if the split is impossible.

    At most 8 GPUs in a tensor-parallel group: beyond a node's, the all-reduce was not measured.
    """
    tp, pp = tensor_parallel_size, pipeline_parallel_size
    require_int("tensor_parallel_size", tp, 1)
    require_int("pipeline_parallel_size", pp, 1)
    if tp > max(_ALL_REDUCE):
        raise ConfigError(f"tensor_parallel_size must be at most {max(_ALL_REDUCE)}, the GPUs of a node, got {tp}")
    if config.num_layers % pp:
        raise ConfigError(f"pipeline_parallel_size must divide the {config.num_layers} layers, got {pp}")
    num_gpus = tp * pp
    layers = config.num_layers // pp
    flop_time = 2 / num_gpus / gpu.flops_per_s
    intercept, per_byte = _all_reduce(tp)
    per_token_reduced = 2 * layers * config.hidden_size * _NUMBER * per_byte
    constant = (
        _weight_read_time(config, gpu, calibration, num_gpus)
        + layers * calibration.layer_overhead_s
        + calibration.step_overhead_s
        + (calibration.dispatch_overhead_s if num_gpus > 1 else 0.0)
    )
    prefill = PrefillFit(
        constant + 2 * layers * intercept,
        calibration.prefill_flops * flop_time * _layer_parameters(config) + per_token_reduced,
        calibration.attention_flops * flop_time * 2 * config.num_layers * config.num_heads * config.head_dim,
    )
    small = DecodeFit(
        constant + 2 * layers * math.log2(tp) * calibration.small_all_reduce_s,
        calibration.kv_read * config.kv_bytes_per_token("float16") / num_gpus / gpu.bandwidth_bytes_per_s,
        calibration.decode_flops * flop_time * _read_parameters(config) + per_token_reduced,
        LARGE_BATCH - 1,
    )
    # No jump between the two: the large fit starts where the small one ends.
    joined = small.constant + (LARGE_BATCH - 1) * (small.per_request - prefill.per_token)
    large = DecodeFit(joined, small.per_context_token, prefill.per_token)
    return FittedLatency(prefill, (small, large))


def transfer(
    measured: FittedLatency,
    config: ModelConfig,
    calibration: Calibration,
    tensor_parallel_size: int,
    source: RatedGpu,
    target: RatedGpu,
) -> FittedLatency:
    """A fit measured on `source` (one stage) for `target`, a GPU that differs from it in memory bandwidth only.

    What is memory traffic changes with the bandwidth: the KV cache read per context token, and the weights read in
    every constant, prefill's too (a prompt long enough to compute while it reads then comes out too slow, by at most
    the added read). Overheads and arithmetic stay.
    """
    if source.flops_per_s != target.flops_per_s:
        raise ConfigError(f"a fit of {source.name} transfers to a GPU of the same FLOP/s only, not to {target.name}")
    added = _weight_read_time(config, target, calibration, tensor_parallel_size) - _weight_read_time(
        config, source, calibration, tensor_parallel_size
    )
    slowdown = source.bandwidth_bytes_per_s / target.bandwidth_bytes_per_s
    return FittedLatency(
        measured.prefill.plus(added),
        tuple(
            replace(fit, constant=fit.constant + added, per_context_token=fit.per_context_token * slowdown)
            for fit in measured.decode
        ),
    )


def _weight_read_time(config: ModelConfig, gpu: RatedGpu, calibration: Calibration, num_gpus: int) -> float:
    num_bytes = _NUMBER * _read_parameters(config) / num_gpus
    return calibration.weight_read * num_bytes / gpu.bandwidth_bytes_per_s


def _layer_parameters(config: ModelConfig) -> int:
    tables = 1 if config.tie_word_embeddings else 2
    return config.num_parameters() - tables * config.vocab_size * config.hidden_size


def _read_parameters(config: ModelConfig) -> int:
    """Of the layers and the LM head: of a separate table of input embeddings, an iteration reads a few rows only."""
    return _layer_parameters(config) + config.vocab_size * config.hidden_size


def _all_reduce(tensor_parallel_size: int) -> tuple[float, float]:
    """Seconds, and seconds a byte."""
    if tensor_parallel_size == 1:
        return 0.0, 0.0
    sizes = np.log2(list(_ALL_REDUCE))
    intercept, per_mib = (
        float(np.interp(np.log2(tensor_parallel_size), sizes, values))
        for values in zip(*_ALL_REDUCE.values(), strict=True)
    )
    return intercept, per_mib / 2**20

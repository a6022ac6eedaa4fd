"""The roofline's calibration: fitted to measured profiles, and its error on those it was not fitted to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace

import numpy as np

from fastserve.core.errors import ConfigError
from fastserve.core.presets import preset
from fastserve.latency.engine_time import EngineTime
from fastserve.latency.fitting import Shape
from fastserve.latency.gpus import A100_80G, RatedGpu
from fastserve.latency.measured_range import MeasuredRange
from fastserve.latency.profile import Profile
from fastserve.latency.roofline import Calibration, predict

FITTED_SHAPES: tuple[Shape, ...] = (
    *(((length,), ()) for length in (64, 128, 256, 512, 1024, 2048)),
    *(((), (context,) * batch) for batch in (1, 4, 16, 64) for context in (128, 512, 1024)),
)
"""Iterations on which predictions are fitted to the measured fits; no batch reaches the roofline's `LARGE_BATCH`."""
FITTED_RANGE = replace(MeasuredRange.spanned(FITTED_SHAPES), iteration_tokens=None)
"""Where predictions are held against measured fits; beyond it they are guesses. The tokens of several prompts have no
bound: as many in one prompt are where time is linear in them."""

CHECKED_SHAPES: tuple[Shape, ...] = (
    *(((length,), ()) for length in (128, 512, 1024)),
    *(((), (512,) * batch) for batch in (1, 16, 64)),
)
"""Iterations on which errors are stated: one prompt, or a decode batch at context 512."""

_OWN_OF_VLLM = ("kv_read", "decode_flops", "prefill_flops", "step_overhead_s", "dispatch_overhead_s")


def calibrate(measured: Iterable[Profile], gpu: RatedGpu = A100_80G) -> dict[str, Calibration]:
    """Calibration of each engine, `swifttransformer` and `vllm`, on profiles measured on `gpu`.

    Both run on the same GPUs, so the weights read, the overhead of a layer, the all-reduce and the attention of prompts
    are fitted to SwiftTransformer (a C++ engine: its host's time per iteration is taken as 0) and then held for vLLM,
    which gets kernels' factors of its own and its host's time.
    """
    by_engine: dict[str, list[Profile]] = {"swifttransformer": [], "vllm": []}
    for profile in measured:
        if profile.engine not in by_engine or profile.pipeline_parallel_size != 1:
            raise ConfigError(
                f"profile {profile.name} (engine {profile.engine}, pipeline_parallel_size "
                f"{profile.pipeline_parallel_size}) cannot calibrate: give profiles of one stage, of "
                + " or ".join(by_engine)
            )
        by_engine[profile.engine].append(profile)
    swift = _fit(by_engine["swifttransformer"], gpu, {"step_overhead_s": 0.0, "dispatch_overhead_s": 0.0})
    shared = {name: value for name, value in asdict(swift).items() if name not in _OWN_OF_VLLM}
    return {"swifttransformer": swift, "vllm": _fit(by_engine["vllm"], gpu, shared)}


def relative_errors(
    profile: Profile, calibration: Calibration, shapes: Iterable[Shape] = CHECKED_SHAPES, gpu: RatedGpu = A100_80G
) -> list[float]:
    """Predicted over measured time less one, for each shape."""
    predicted = predict(preset(profile.model), gpu, calibration, profile.tensor_parallel_size)
    return [predicted.iteration_time(*shape) / profile.stage.iteration_time(*shape) - 1 for shape in shapes]


def difference_as_engine_time(slower: Profile, faster: Profile) -> EngineTime:
    """What one engine takes more than another for the same work: by iteration, by request and by token.

    Non-negative least squares over `FITTED_SHAPES`, on errors relative to the slower engine's times.
    """
    from scipy.optimize import nnls

    rows, more = [], []
    for prompts, contexts in FITTED_SHAPES:
        seconds = slower.latency.iteration_time(prompts, contexts)
        requests, tokens = len(prompts) + len(contexts), sum(prompts) + len(contexts)
        rows.append([1 / seconds, requests / seconds, tokens / seconds])
        more.append(1 - faster.latency.iteration_time(prompts, contexts) / seconds)
    matrix = np.array(rows)
    scale = matrix.max(axis=0)
    solution, _ = nnls(matrix / scale, np.array(more))
    per_iteration_s, per_request_s, per_token_s = (float(value) for value in solution / scale)
    return EngineTime(per_iteration_s, per_request_s, per_token_s, source="fitted")


def _fit(profiles: list[Profile], gpu: RatedGpu, known: Mapping[str, float]) -> Calibration:
    """Non-negative least squares on relative errors over `FITTED_SHAPES`, for what is not `known`."""
    from scipy.optimize import nnls

    if not profiles:
        raise ConfigError("no measured profile to calibrate on: give at least one of each engine")
    unknown = [field.name for field in fields(Calibration) if field.name not in known]
    base = Calibration(**known)
    rows, offsets = [], []
    for profile in profiles:
        config, tp = preset(profile.model), profile.tensor_parallel_size
        # A prediction is linear in the calibration: its columns are the predictions for one unit of each unknown.
        fits = [predict(config, gpu, replace(base, **{name: 1.0}), tp) for name in unknown]
        known_part = predict(config, gpu, base, tp)
        for shape in FITTED_SHAPES:
            seconds = profile.stage.iteration_time(*shape)
            offset = known_part.iteration_time(*shape)
            rows.append([(fit.iteration_time(*shape) - offset) / seconds for fit in fits])
            offsets.append(1 - offset / seconds)
    matrix = np.array(rows)
    scale = np.where(matrix.any(axis=0), np.abs(matrix).max(axis=0), 1.0)
    solution, _ = nnls(matrix / scale, np.array(offsets))
    return replace(base, **dict(zip(unknown, (float(value) for value in solution / scale), strict=True)))

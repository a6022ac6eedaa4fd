"""Measure iteration times over a grid, fit them, and say how well the fit describes them. Torch-free."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastserve.latency.fitted import DecodeFit, FittedLatency, PrefillFit

Shape = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt lengths and decode context lengths of one iteration."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Median time of one iteration shape."""

    prefill_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Grid:
    """What to measure: prompts alone and several at once, decode batches at several contexts, and a few mixtures."""

    prefill_lens: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    context_lens: tuple[int, ...]

    @classmethod
    def for_model(cls, max_model_len: int, max_batch_size: int, *, quick: bool = False) -> Grid:
        """Powers of two up to the model's context and the batch size; `quick` measures a corner of that."""
        longest = min(max_model_len - 1, 256 if quick else 1024)
        lengths = [length for length in (16, 32, 64, 128, 256, 512, 1024, 2048) if length < longest]
        batches = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size < max_batch_size]
        step = 2 if quick else 1
        return cls(
            (*lengths[::step], longest), (*batches[:: 2 * step], max_batch_size), (*lengths[1 :: 2 * step], longest)
        )

    @property
    def shapes(self) -> list[Shape]:
        """Iterations to time."""
        prefills: list[Shape] = [((length,), ()) for length in self.prefill_lens]
        prefills += [((length // 4,) * 4, ()) for length in self.prefill_lens if length >= 16]
        decodes: list[Shape] = [((), (length,) * size) for size in self.batch_sizes for length in self.context_lens]
        middle, batch = self.prefill_lens[len(self.prefill_lens) // 2], self.batch_sizes[-1]
        mixed: list[Shape] = [((middle,), (context,) * batch) for context in self.context_lens]
        return prefills + decodes + mixed


def measure(
    run: Callable[[Sequence[int], Sequence[int]], float],
    shapes: Sequence[Shape],
    repeats: int,
    on_measured: Callable[[], None] = lambda: None,
) -> list[Measurement]:
    """Time each shape with `run(prefill_lens, context_lens) -> seconds`: once to warm up, then the median of `repeats`.

    Repeats go round the whole grid, so that a slow spell of the machine spreads over all points.
    """
    for prefill_lens, context_lens in shapes:
        run(prefill_lens, context_lens)
        on_measured()
    times: list[list[float]] = [[] for _ in shapes]
    for _ in range(repeats):
        for samples, (prefill_lens, context_lens) in zip(times, shapes, strict=True):
            samples.append(run(prefill_lens, context_lens))
            on_measured()
    return [
        Measurement(prefill, context, statistics.median(samples))
        for (prefill, context), samples in zip(shapes, times, strict=True)
    ]


def fit(measurements: Sequence[Measurement], *, by_batch_size: bool = False) -> FittedLatency:
    """Least squares on relative errors, coefficients of at least 0, prefill and decode apart; mixtures are not used.

    With `by_batch_size` each batch size that was measured has a decode fit of its own, up to the time of a request
    more, which is common to all. It serves the sizes since the one before as well, the last one all beyond.
    """
    prefill = [m for m in measurements if not m.context_lens]
    decode = [m for m in measurements if not m.prefill_lens]
    prefill_fit = PrefillFit(
        *_non_negative_fit(
            [(1, sum(m.prefill_lens), sum(n * n for n in m.prefill_lens)) for m in prefill],
            [m.seconds for m in prefill],
        )
    )
    constant, per_context_token, per_request = _non_negative_fit(
        [(1, sum(m.context_lens), len(m.context_lens)) for m in decode], [m.seconds for m in decode]
    )
    if not by_batch_size:
        return FittedLatency(prefill_fit, (DecodeFit(constant, per_context_token, per_request),))
    sizes = sorted({len(m.context_lens) for m in decode})
    return FittedLatency(
        prefill_fit,
        tuple(_fit_of_size(size, decode, per_request, None if size == sizes[-1] else size) for size in sizes),
    )


def _fit_of_size(
    size: int, measurements: Sequence[Measurement], per_request: float, max_batch_size: int | None
) -> DecodeFit:
    own = [m for m in measurements if len(m.context_lens) == size]
    constant, per_context_token = _non_negative_fit([(1, sum(m.context_lens)) for m in own], [m.seconds for m in own])
    return DecodeFit(constant - per_request * size, per_context_token, per_request, max_batch_size)


def with_overhead(latency: FittedLatency, seconds: float) -> FittedLatency:
    """The same with so many seconds more for every iteration, such as an engine takes from one to the next."""
    prefill = replace(latency.prefill, constant=latency.prefill.constant + seconds)
    return FittedLatency(prefill, tuple(replace(fit, constant=fit.constant + seconds) for fit in latency.decode))


def residuals(latency: FittedLatency, measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Every point with its prediction, and the relative error by kind of iteration: mean, and largest."""
    points = []
    errors: dict[str, list[float]] = {"prefill": [], "decode": [], "mixed": []}
    for m in measurements:
        predicted = latency.iteration_time(m.prefill_lens, m.context_lens)
        kind = "prefill" if not m.context_lens else "decode" if not m.prefill_lens else "mixed"
        errors[kind].append(abs(predicted - m.seconds) / m.seconds)
        points.append(
            {
                "prefill_lens": list(m.prefill_lens),
                "context_lens": list(m.context_lens),
                "measured_s": m.seconds,
                "predicted_s": predicted,
            }
        )
    summary = {
        kind: {"points": len(values), "mean_relative_error": float(np.mean(values)), "max_relative_error": max(values)}
        for kind, values in errors.items()
        if values
    }
    return {**summary, "measurements": points}


def _non_negative_fit(rows: Sequence[tuple[float, ...]], seconds: Sequence[float]) -> list[float]:
    from scipy.optimize import nnls

    times = np.array(seconds)
    matrix = np.array(rows, dtype=float) / times[:, None]
    scale = matrix.max(axis=0)
    solution, _ = nnls(matrix / scale, np.ones(len(times)))
    return [float(value) for value in solution / scale]

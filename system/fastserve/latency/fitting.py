"""Measure iteration times over a grid, fit them, and say how well the fit describes them. Torch-free."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fastserve.latency.communication import StageLink
from fastserve.latency.fitted import DecodeFit, FittedLatency, PrefillCurve, PrefillFit

T = TypeVar("T")
Shape = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt lengths and decode context lengths of one iteration."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Median time of one iteration shape."""

    prefill_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    seconds: float


class StageTimes(NamedTuple):
    """Seconds of an iteration in a full pipeline."""

    stages: tuple[float, ...]
    """Of each stage, from the first."""
    channel_s: float
    """For telling the ranks, and for hearing from them: what is left of the time until the slowest has answered."""


@dataclass(frozen=True, slots=True)
class Grid:
    """What to measure: prompts alone and several at once, decode batches at several contexts, and a few mixtures."""

    prefill_lens: tuple[int, ...]
    """Tokens of an iteration with prompts."""
    divided_lens: tuple[int, ...]
    """Those of them that are measured as four equal prompts as well."""
    batch_sizes: tuple[int, ...]
    context_lens: tuple[int, ...]
    mixed_lens: tuple[int, ...]
    """Prompts that run together with the largest decode batch."""

    @classmethod
    def for_model(cls, max_model_len: int, max_batch_size: int, *, quick: bool = False) -> Grid:
        """Powers of two up to the model's context and the batch size; `quick` measures a corner of that."""
        longest = min(max_model_len - 1, 256 if quick else 1024)
        lengths = [length for length in (16, 32, 64, 128, 256, 512, 1024, 2048) if length < longest]
        batches = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size < max_batch_size]
        step = 2 if quick else 1
        prefill_lens = (*lengths[::step], longest)
        return cls(
            prefill_lens,
            tuple(length for length in prefill_lens if length >= 16),
            (*batches[:: 2 * step], max_batch_size),
            (*lengths[1 :: 2 * step], longest),
            (prefill_lens[len(prefill_lens) // 2],),
        )

    @classmethod
    def dense(
        cls,
        max_model_len: int,
        max_batch_size: int,
        token_budget: int,
        graph_sizes: Sequence[int] = (),
        *,
        quick: bool = False,
    ) -> Grid:
        """For fits that follow a GPU's steps (`fit(by_batch_size=True, curve=True)`).

        Matrix products are cut in pieces, so prompts are measured a little below and above every multiple of 64 tokens
        up to the token budget, at lengths for which a decode batch has no kernels of its own. Decodes up to the model's
        context, of every batch up to 8, then of every 4, and of `graph_sizes`. `quick` takes steps four times as long.
        """
        longest = min(max_model_len - 1, token_budget)
        step = 256 if quick else 64
        below = range(step - 1, longest, step)
        lengths = {5, 13, 21, 37, 51, 95, *below, *(length + 8 for length in below), longest}
        sizes = {*range(1, min(8, max_batch_size)), *range(8, max_batch_size, 16 if quick else 4), max_batch_size}
        sizes |= {size for size in graph_sizes if size <= max_batch_size}
        last = max_model_len - 1
        return cls(
            tuple(sorted(length for length in lengths if length <= longest)),
            tuple(sorted({length for length in (*below[::4], longest) if length >= 16})),
            tuple(sorted(sizes)),
            tuple(sorted({max(2, last // 16), max(2, last // 4), max(2, last // 2), last})),
            tuple(sorted({max(1, longest // share) for share in (16, 8, 4, 2)})),
        )

    @property
    def shapes(self) -> list[Shape]:
        """Iterations to time."""
        prefills: list[Shape] = [((length,), ()) for length in self.prefill_lens]
        prefills += [(_in_four(length), ()) for length in self.divided_lens]
        decodes: list[Shape] = [((), (length,) * size) for size in self.batch_sizes for length in self.context_lens]
        batch = self.batch_sizes[-1]
        mixed: list[Shape] = [
            ((length,), (context,) * batch) for length in self.mixed_lens for context in self.context_lens
        ]
        return prefills + decodes + mixed


def _in_four(length: int) -> tuple[int, ...]:
    """Four prompts of `length` tokens in all, as equal as can be."""
    return tuple(length // 4 + (i < length % 4) for i in range(4))


def measure(
    run: Callable[[Sequence[int], Sequence[int]], float],
    shapes: Sequence[Shape],
    repeats: int,
    on_measured: Callable[[], None] = lambda: None,
) -> list[Measurement]:
    """Time each shape with `run(prefill_lens, context_lens) -> seconds`; the median of what `sample` gives."""
    return [
        Measurement(prefill, context, statistics.median(samples))
        for (prefill, context), samples in zip(shapes, sample(run, shapes, repeats, on_measured), strict=True)
    ]


def sample(
    run: Callable[[Sequence[int], Sequence[int]], T],
    shapes: Sequence[Shape],
    repeats: int,
    on_measured: Callable[[], None] = lambda: None,
) -> list[list[T]]:
    """What `run(prefill_lens, context_lens)` gives for each shape: once to warm up, then `repeats` times.

    Repeats go round the whole grid, so that a slow spell of the machine spreads over all points.
    """
    for prefill_lens, context_lens in shapes:
        run(prefill_lens, context_lens)
        on_measured()
    times: list[list[T]] = [[] for _ in shapes]
    for _ in range(repeats):
        for samples, (prefill_lens, context_lens) in zip(times, shapes, strict=True):
            samples.append(run(prefill_lens, context_lens))
            on_measured()
    return times


def by_stage(
    shapes: Sequence[Shape],
    samples: Sequence[Sequence[StageTimes]],
    link: StageLink | None,
    average: Callable[[Iterable[float]], float],
) -> list[list[Measurement]]:
    """For each stage its average time of each shape, of which `samples` has some.

    The stages of a full pipeline move on together, when the slowest has ended, receiving and being told included. Where
    their times vary, that takes longer than the stage that is slowest on average: this one is given the difference.
    """
    channel_s = average(each.channel_s for of_shape in samples for each in of_shape)
    stages: list[list[Measurement]] = [[] for _ in samples[0][0].stages]
    for (prefill_lens, context_lens), of_shape in zip(shapes, samples, strict=True):
        receiving_s = link.transfer_time(sum(prefill_lens) + len(context_lens)) if link else 0.0
        added = [channel_s, *[receiving_s] * (len(stages) - 1)]
        times = [average(each.stages[stage] for each in of_shape) for stage in range(len(stages))]
        if len(stages) > 1:
            busy = [seconds + more for seconds, more in zip(times, added, strict=True)]
            step = average(max(map(operator.add, each.stages, added)) for each in of_shape)
            times[busy.index(max(busy))] += max(0.0, step - max(busy))
        for measurements, seconds in zip(stages, times, strict=True):
            measurements.append(Measurement(prefill_lens, context_lens, seconds))
    return stages


def fit(measurements: Sequence[Measurement], *, by_batch_size: bool = False, curve: bool = False) -> FittedLatency:
    """Least squares on relative errors, coefficients of at least 0, prefill and decode apart; mixtures are not used.

    With `by_batch_size` each batch size that was measured has a decode fit of its own, up to the time of a request
    more, which is common to all. It serves the sizes since the one before as well, the last one all beyond. With
    `curve` prefill is a curve through every number of tokens that was measured.
    """
    prefill = [m for m in measurements if not m.context_lens]
    decode = [m for m in measurements if not m.prefill_lens]
    prefill_fit = _curve(prefill) if curve else _line(prefill)
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


def _line(prefill: Sequence[Measurement]) -> PrefillFit:
    rows = [(1, sum(m.prefill_lens), _pairs(m)) for m in prefill]
    return PrefillFit(*_non_negative_fit(rows, [m.seconds for m in prefill]))


def _curve(prefill: Sequence[Measurement]) -> PrefillCurve:
    """An unknown for each number of tokens, and one for attention, which tells one prompt from several of as many."""
    numbers = sorted({sum(m.prefill_lens) for m in prefill})
    rows = [(*(float(sum(m.prefill_lens) == number) for number in numbers), _pairs(m)) for m in prefill]
    *seconds, per_token_squared = _non_negative_fit(rows, [m.seconds for m in prefill])
    return PrefillCurve(tuple(numbers), tuple(seconds), per_token_squared)


def _pairs(m: Measurement) -> int:
    return sum(length * length for length in m.prefill_lens)


def _fit_of_size(
    size: int, measurements: Sequence[Measurement], per_request: float, max_batch_size: int | None
) -> DecodeFit:
    own = [m for m in measurements if len(m.context_lens) == size]
    constant, per_context_token = _non_negative_fit([(1, sum(m.context_lens)) for m in own], [m.seconds for m in own])
    return DecodeFit(constant - per_request * size, per_context_token, per_request, max_batch_size)


def with_overhead(latency: FittedLatency, seconds: float, per_request: float = 0.0) -> FittedLatency:
    """The same with so many seconds more for every iteration, and for every request of a decode iteration, such as an
    engine takes from one iteration to the next."""
    return FittedLatency(latency.prefill.plus(seconds), tuple(fit.plus(seconds, per_request) for fit in latency.decode))


def times_between(start_s: Sequence[float], end_s: Sequence[float]) -> np.ndarray:
    """Seconds from the end of each iteration to the start of the next, of a run that never idles."""
    return np.asarray(start_s, dtype=float)[1:] - np.asarray(end_s, dtype=float)[:-1]


def overhead_by_batch(between_s: Sequence[float] | np.ndarray, batch_sizes: Sequence[int]) -> tuple[float, float]:
    """Seconds, and seconds a request, of an engine between two iterations: the Theil-Sen line, neither below 0.

    Robust, since a few of the gaps have the operating system in them. `batch_sizes` are of the iterations before.
    """
    gaps, sizes = np.asarray(between_s, dtype=float), np.asarray(batch_sizes)
    if len(set(batch_sizes)) < 2:
        return max(0.0, float(np.median(gaps))), 0.0
    from scipy.stats import theilslopes

    per_request = max(0.0, float(theilslopes(gaps, sizes).slope))
    seconds = float(np.median(gaps - per_request * sizes))
    return (seconds, per_request) if seconds >= 0 else (0.0, float(np.median(gaps / sizes)))


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

"""Kernel tables: measured times of the kernels of one pipeline stage, as the profile's file holds them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fastserve.core.errors import ConfigError
from fastserve.latency.measured_range import MeasuredRange


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds over a number of tokens, sequences or the like: linear between measured points.

    Before the first point it has the first value. Beyond the last it continues with the slope between the last two, or
    stays level if that slope is negative.
    """

    at: tuple[int, ...]
    """Ascending, at least one."""
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.at or len(self.at) != len(self.seconds):
            raise ConfigError(
                f"a curve needs as many seconds as points, at least one; got {len(self.at)} points and "
                f"{len(self.seconds)} seconds"
            )
        _check_ascending("the points of a curve", self.at)
        for point, value in zip(self.at, self.seconds, strict=True):
            if not 0 <= value < math.inf:
                raise ConfigError(f"the curve's time at {point} is {value!r}; give seconds of at least 0")


@dataclass(frozen=True, slots=True)
class KernelTables:
    """Kernel times of one pipeline stage: all its layers, in seconds, for one shard.

    An axis may have other points in each row: tables need not be rectangular.
    """

    dense: Curve
    """By tokens of the iteration: matrix products, element-wise work, and all-reduces among the shards."""
    decode: tuple[tuple[int, Curve], ...]
    """Attention of an iteration that only decodes: a number of decodes, and seconds by the context of each."""
    prompts: tuple[tuple[int, Curve], ...]
    """Attention of an iteration of prompts: a chunk's tokens, and seconds by the tokens of its cached prefix; or, if
    `prompts_by_length`, a number of whole prompts, and seconds by the length of each."""
    prompts_by_length: bool
    per_sequence: Curve | None = None
    """By sequences of the iteration: LM head and sampler. None: they are in another stage."""
    mixed: tuple[tuple[int, int, int, Curve], ...] = ()
    """Attention of an iteration of both: a chunk's tokens, its cached prefix, the number of decodes, and seconds by the
    context of each. Empty: not measured; the attention of prompts and that of decodes are then added."""
    unequal_contexts: float = 0.0
    """How far decodes of unequal contexts take longer: as a share of the way from the time of as many decodes of the
    mean context to that of as many of the longest. 0: not measured."""

    def __post_init__(self) -> None:
        for what, rows in (("decode", self.decode), ("prompts", self.prompts)):
            if not rows:
                raise ConfigError(f"kernel tables without {what}: give one row at least")
            _check_ascending(f"the first numbers of {what}", [number for number, _ in rows])
        _check_ascending("the first three numbers of mixed", [(*numbers,) for *numbers, _ in self.mixed])
        if self.mixed and self.prompts_by_length:
            raise ConfigError("mixed is given by chunk and prefix; prompts must be, too, not by length")
        if not 0 <= self.unequal_contexts <= 1:
            raise ConfigError(f"unequal_contexts must be from 0 to 1, got {self.unequal_contexts!r}")

    @property
    def range(self) -> MeasuredRange:
        """The largest iteration, prompt, decode batch and context that was measured in any row."""
        if self.prompts_by_length:
            longest = max(curve.at[-1] for _, curve in self.prompts)
        else:
            longest = max(chunk + curve.at[-1] for chunk, curve in self.prompts)
        return MeasuredRange(
            iteration_tokens=self.dense.at[-1],
            prompt_tokens=longest,
            decodes=self.decode[-1][0],
            context_tokens=max(curve.at[-1] for _, curve in self.decode),
        )


def _check_ascending(what: str, values: Iterable[object]) -> None:
    before = None
    for value in values:
        if before is not None and not before < value:  # type: ignore[operator]
            raise ConfigError(f"{what} must ascend, got {value} after {before}")
        before = value

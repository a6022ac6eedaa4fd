"""IterationLog: the iterations that an engine has computed, by column."""

from __future__ import annotations

from collections.abc import Iterator
from typing import overload

from fastserve.engine.records import IterationRecord


class IterationLog:
    """A sequence of IterationRecord, kept as a list for each of its fields.

    A run computes millions of iterations: an object for each would keep Python's garbage collector busy.
    """

    __slots__ = (
        "_end_s",
        "_free_gpu_blocks",
        "_free_host_blocks",
        "_num_preempted",
        "_num_requests",
        "_num_scheduled_tokens",
        "_num_waiting",
        "_stalled_s",
        "_start_s",
    )

    def __init__(self) -> None:
        self._start_s: list[float] = []
        self._end_s: list[float] = []
        self._num_requests: list[int] = []
        self._num_scheduled_tokens: list[int] = []
        self._num_waiting: list[int] = []
        self._free_gpu_blocks: list[int] = []
        self._free_host_blocks: list[int] = []
        self._num_preempted: list[int] = []
        self._stalled_s: list[float] = []

    def add(
        self,
        start_s: float,
        end_s: float,
        num_requests: int,
        num_scheduled_tokens: int,
        num_waiting: int,
        free_gpu_blocks: int,
        free_host_blocks: int,
        num_preempted: int,
        stalled_s: float,
    ) -> None:
        """Append an iteration: the fields of IterationRecord."""
        self._start_s.append(start_s)
        self._end_s.append(end_s)
        self._num_requests.append(num_requests)
        self._num_scheduled_tokens.append(num_scheduled_tokens)
        self._num_waiting.append(num_waiting)
        self._free_gpu_blocks.append(free_gpu_blocks)
        self._free_host_blocks.append(free_host_blocks)
        self._num_preempted.append(num_preempted)
        self._stalled_s.append(stalled_s)

    def add_alike(
        self,
        times: list[float],
        batch: int,
        num_waiting: int,
        free_gpu_blocks: list[int],
        free_host_blocks: int,
        stalled_s: float,
    ) -> None:
        """Append iterations in which the same `batch` requests compute a token each.

        Iteration k lasts from `times[k]` to `times[k + 1]` (s), with `free_gpu_blocks[k]`; `stalled_s` is before the
        first.
        """
        count = len(times) - 1
        self._start_s += times[:count]
        self._end_s += times[1:]
        self._num_requests += [batch] * count
        self._num_scheduled_tokens += [batch] * count
        self._num_waiting += [num_waiting] * count
        self._free_gpu_blocks += free_gpu_blocks
        self._free_host_blocks += [free_host_blocks] * count
        self._num_preempted += [0] * count
        self._stalled_s.append(stalled_s)
        self._stalled_s += [0.0] * (count - 1)

    def clear(self) -> None:
        """Forget all iterations."""
        for column in self.columns():
            column.clear()

    @property
    def last_duration_s(self) -> float:
        """Seconds that the last iteration took; IndexError if there is none."""
        return self._end_s[-1] - self._start_s[-1]

    def columns(self) -> tuple[list[float] | list[int], ...]:
        """The values of each field of IterationRecord, in its order. Not a copy: do not change them."""
        return (
            self._start_s,
            self._end_s,
            self._num_requests,
            self._num_scheduled_tokens,
            self._num_waiting,
            self._free_gpu_blocks,
            self._free_host_blocks,
            self._num_preempted,
            self._stalled_s,
        )

    def __len__(self) -> int:
        return len(self._end_s)

    @overload
    def __getitem__(self, index: int) -> IterationRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[IterationRecord]: ...
    def __getitem__(self, index: int | slice) -> IterationRecord | list[IterationRecord]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return IterationRecord(*[column[index] for column in self.columns()])  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[IterationRecord]:
        for i in range(len(self)):
            yield self[i]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IterationLog) and self.columns() == other.columns()

    def __repr__(self) -> str:
        return f"IterationLog of {len(self)} iterations"

    __hash__ = None  # type: ignore[assignment]

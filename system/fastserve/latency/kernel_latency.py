"""Iteration time from kernel tables."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from fastserve.latency.kernel_tables import Curve, KernelTables

_FEW_ITERATIONS = 16
"""Up to as many iterations in a row are priced one by one: numpy takes longer to begin."""


class Line:
    """A piecewise linear curve, ready to be read: the values of a `Curve`, or of two curves weighed."""

    __slots__ = ("_at", "_at_array", "_seconds", "_seconds_array", "_slopes", "_slopes_array")

    def __init__(self, at: list[float], seconds: list[float]) -> None:
        self._at = at
        self._seconds = seconds
        """The value from each point on; the first is also that before it."""
        self._slopes = [(seconds[i + 1] - seconds[i]) / (at[i + 1] - at[i]) for i in range(len(at) - 1)]
        # The slope beyond the last point. Noise may tilt the last two, and no time may fall to 0 far beyond them.
        self._slopes.append(max(self._slopes[-1], 0.0) if self._slopes else 0.0)
        self._at_array: np.ndarray | None = None
        self._seconds_array: np.ndarray | None = None
        self._slopes_array: np.ndarray | None = None

    def value(self, x: float) -> float:
        """Seconds at `x`."""
        i = bisect_right(self._at, x) - 1
        if i < 0:
            return self._seconds[0]
        return self._seconds[i] + self._slopes[i] * (x - self._at[i])

    def values(self, x: np.ndarray) -> np.ndarray:
        """What `value` gives for each, to the bit; `x` ascends."""
        at, seconds, slopes = self._at_array, self._seconds_array, self._slopes_array
        if at is None or seconds is None or slopes is None:
            at = self._at_array = np.array(self._at)
            seconds = self._seconds_array = np.array(self._seconds)
            slopes = self._slopes_array = np.array(self._slopes)
        if x[0] >= at[0] and (i := bisect_right(self._at, float(x[0])) - 1) == bisect_right(self._at, float(x[-1])) - 1:
            same: np.ndarray = self._seconds[i] + self._slopes[i] * (x - self._at[i])
            return same
        index = np.searchsorted(at, x, side="right") - 1
        inside = np.maximum(index, 0)
        result: np.ndarray = np.where(index < 0, self._seconds[0], seconds[inside] + slopes[inside] * (x - at[inside]))
        return result

    def points(self) -> list[float]:
        """Where the slope changes. Not a copy: do not change it."""
        return self._at


def _line(curve: Curve) -> Line:
    return Line([float(point) for point in curve.at], list(curve.seconds))


class Rows:
    """Lines by a number, such as decode attention: seconds by context for some numbers of decodes."""

    __slots__ = ("_between", "_lines", "_numbers")

    def __init__(self, rows: Sequence[tuple[int, Curve]]) -> None:
        self._numbers = [number for number, _ in rows]
        self._lines = [_line(curve) for _, curve in rows]
        self._between: dict[int, Line] = {}

    def row(self, number: int) -> Line:
        """The line of this number: measured, or weighed between the two measured neighbours."""
        found = self._between.get(number)
        if found is None:
            found = self._between[number] = self._make_row(number)
        return found

    def value(self, number: int, x: float) -> float:
        """What the line of this number gives at `x`, but for rounding; for numbers that seldom come twice."""
        numbers, lines = self._numbers, self._lines
        low, high = _neighbours(numbers, number)
        if low == high:
            return lines[low].value(x)
        return _between(number, numbers[low], numbers[high], lines[low].value(x), lines[high].value(x))

    def _make_row(self, number: int) -> Line:
        numbers = self._numbers
        i, j = _neighbours(numbers, number)
        low, high = self._lines[i], self._lines[j]
        if i == j:
            return low
        # Beyond the last number as between the last two, but not falling.
        beyond = number > numbers[-1]
        share = (number - numbers[i]) / (numbers[j] - numbers[i])
        at = sorted({*low.points(), *high.points()})
        if beyond:  # A point more, so that the line goes on with the slopes of both.
            at.append(2 * at[-1])
        seconds = []
        for x in at:
            below, above = low.value(x), high.value(x)
            seconds.append(max(below + share * (above - below), above) if beyond else below + share * (above - below))
        return Line(at, seconds)


class _Mixed:
    """Attention of a chunk over its prefix beside decodes of one context, in the four numbers it was measured in."""

    __slots__ = ("_chunks", "_prefixes", "_rows")

    def __init__(self, rows: Sequence[tuple[int, int, int, Curve]]) -> None:
        self._chunks: list[int] = []
        self._prefixes: list[list[int]] = []
        """Of each chunk."""
        self._rows: list[list[Rows]] = []
        """Of each chunk, of each prefix."""
        tables: dict[tuple[int, int], list[tuple[int, Curve]]] = {}
        for chunk, prefix, decodes, curve in rows:
            tables.setdefault((chunk, prefix), []).append((decodes, curve))
        for (chunk, prefix), table in tables.items():
            if not self._chunks or self._chunks[-1] != chunk:
                self._chunks.append(chunk)
                self._prefixes.append([])
                self._rows.append([])
            self._prefixes[-1].append(prefix)
            self._rows[-1].append(Rows(table))

    def seconds(
        self, chunk: int, prefix: int, decodes: int, mean: float, longest: float, share_of_longest: float
    ) -> float:
        """Linear in each number between the measured ones; `share_of_longest` of the way from mean to longest context.

        Rows are looked up once for both contexts.
        """
        chunks = self._chunks
        i, j = _neighbours(chunks, chunk)
        low = self._of_chunk(i, prefix, decodes, mean, longest, share_of_longest)
        if i == j:
            return low
        high = self._of_chunk(j, prefix, decodes, mean, longest, share_of_longest)
        return _between(chunk, chunks[i], chunks[j], low, high)

    def _of_chunk(
        self, index: int, prefix: int, decodes: int, mean: float, longest: float, share_of_longest: float
    ) -> float:
        prefixes, rows = self._prefixes[index], self._rows[index]
        i, j = _neighbours(prefixes, prefix)
        low = _of_contexts(rows[i].row(decodes), mean, longest, share_of_longest)
        if i == j:
            return low
        high = _of_contexts(rows[j].row(decodes), mean, longest, share_of_longest)
        return _between(prefix, prefixes[i], prefixes[j], low, high)


def _neighbours(numbers: list[int], number: int) -> tuple[int, int]:
    """Positions of the measured numbers around this one: twice the same if it is measured or below all of them.

    Beyond the last, those of the last two.
    """
    i = bisect_right(numbers, number) - 1
    if i < 0:
        return 0, 0
    if numbers[i] == number or len(numbers) == 1:
        return i, i
    i = min(i, len(numbers) - 2)
    return i, i + 1


def _between(x: int, low_x: int, high_x: int, low: float, high: float) -> float:
    """Linear between two points; beyond the second as between the two, but not falling."""
    result = low + (high - low) * (x - low_x) / (high_x - low_x)
    return max(result, high) if x > high_x else result


def _of_contexts(line: Line, mean: float, longest: float, share_of_longest: float) -> float:
    """Seconds of a batch of unequal contexts, by the line of equal ones."""
    seconds = line.value(mean)
    if share_of_longest:
        seconds = seconds + share_of_longest * (line.value(longest) - seconds)
    return seconds


def _sum_and_longest(lens: list[int]) -> tuple[int, int]:
    """Of at least one length. Compiled, a loop takes a third of `sum` and `max`."""
    total, longest = 0, 0
    for length in lens:
        total += length
        if length > longest:
            longest = length
    return total, longest


class KernelLatency:
    """LatencyModel of one pipeline stage from its kernel tables: exact at measured points, linear between them.

    What the tables do not have is made of what they have:

    - Decodes of unequal contexts take the time of their mean context, `unequal_contexts` of the way to their longest,
      and never less than the longest context alone.
    - Several chunks in an iteration take the time of the longest-running one, and for each other what it takes above
      the shortest kernel.
    - Whole prompts by length: chunks are priced as whole prompts of as many attended pairs, and never less than the
      decode of the longest context.
    """

    __slots__ = (
        "_decode",
        "_dense",
        "_mixed",
        "_one_decode",
        "_per_sequence",
        "_prompts",
        "_prompts_by_length",
        "_shortest_prompt_s",
        "_unequal",
        "tables",
    )

    def __init__(self, tables: KernelTables) -> None:
        self.tables = tables
        self._dense = _line(tables.dense)
        self._per_sequence = None if tables.per_sequence is None else _line(tables.per_sequence)
        self._decode = Rows(tables.decode)
        self._one_decode = self._decode.row(1)
        self._prompts = Rows(tables.prompts)
        self._prompts_by_length = tables.prompts_by_length
        self._shortest_prompt_s = tables.prompts[0][1].seconds[0]
        self._mixed = _Mixed(tables.mixed) if tables.mixed else None
        self._unequal = tables.unequal_contexts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KernelLatency) and (self is other or self.tables == other.tables)

    def __hash__(self) -> int:
        return hash(self.tables.dense)

    def iteration_time(
        self, prefill_lens: Sequence[int], decode_context_lens: Sequence[int], prefix_lens: Sequence[int] = ()
    ) -> float:
        """Seconds for one iteration; 0 for an empty one."""
        num_decodes = len(decode_context_lens)
        num_sequences = len(prefill_lens) + num_decodes
        if not num_sequences:
            return 0.0
        seconds = self._beside_attention(sum(prefill_lens) + num_decodes, num_sequences)
        mean, longest = 0.0, 0
        if num_decodes:
            contexts = decode_context_lens if isinstance(decode_context_lens, list) else list(decode_context_lens)
            total, longest = _sum_and_longest(contexts)
            mean = total / num_decodes
            if not prefill_lens:
                return seconds + self._decode_attention(num_decodes, mean, longest)
        return seconds + self._attention(prefill_lens, prefix_lens, num_decodes, mean, longest)

    def decode_times(self, context_lens: Sequence[int], count: int) -> np.ndarray:
        """What `iteration_time` gives for `count` decode iterations in a row, to the bit."""
        batch = len(context_lens)
        total, longest_now = _sum_and_longest(list(context_lens))
        if count <= _FEW_ITERATIONS:
            beside = self._beside_attention(batch, batch)
            times = [
                beside + self._decode_attention(batch, (total + step * batch) / batch, longest_now + step)
                for step in range(count)
            ]
            return np.array(times, dtype=float)
        steps = np.arange(count, dtype=np.int64)
        means = (steps * batch + total) / batch
        longest = steps + longest_now
        row = self._decode.row(batch)
        attention = row.values(means)
        if self._unequal:
            attention = attention + self._unequal * (row.values(longest) - attention)
        attention = np.maximum(attention, self._one_decode.values(longest))
        return self._beside_attention(batch, batch) + attention

    def _beside_attention(self, num_tokens: int, num_sequences: int) -> float:
        seconds = self._dense.value(num_tokens)
        return seconds if self._per_sequence is None else seconds + self._per_sequence.value(num_sequences)

    def _decode_attention(self, num_decodes: int, mean: float, longest: int) -> float:
        seconds = _of_contexts(self._decode.row(num_decodes), mean, longest, self._unequal)
        return max(seconds, self._one_decode.value(longest))

    def _attention(
        self, chunks: Sequence[int], prefixes: Sequence[int], num_decodes: int, mean: float, longest_context: int
    ) -> float:
        """Attention of an iteration with prompts."""
        if self._prompts_by_length:
            seconds = self._by_length(chunks, prefixes)
            if num_decodes:
                seconds += self._decode_attention(num_decodes, mean, longest_context)
            return seconds
        longest, chunk, prefix, others = -1.0, 0, 0, 0.0
        for i, tokens in enumerate(chunks):
            cached = prefixes[i] if prefixes else 0
            alone = self._prompts.value(tokens, cached)
            if alone > longest:
                if longest >= 0.0:
                    others += max(longest - self._shortest_prompt_s, 0.0)
                longest, chunk, prefix = alone, tokens, cached
            else:
                others += max(alone - self._shortest_prompt_s, 0.0)
        if not num_decodes:
            return longest + others
        if self._mixed is None:
            return longest + others + self._decode_attention(num_decodes, mean, longest_context)
        seconds = self._mixed.seconds(chunk, prefix, num_decodes, mean, longest_context, self._unequal)
        return max(seconds, longest) + others

    def _by_length(self, chunks: Sequence[int], prefixes: Sequence[int]) -> float:
        pairs, longest = 0, 0
        for i, tokens in enumerate(chunks):
            cached = prefixes[i] if prefixes else 0
            pairs += tokens * (tokens + 2 * cached)
            longest = max(longest, tokens + cached)
        length = (pairs / len(chunks)) ** 0.5
        return max(self._prompts.row(len(chunks)).value(length), self._one_decode.value(longest))

"""Questions about a trace whose numbers are orders of magnitude off, most likely by a mistaken unit."""

from __future__ import annotations

from collections.abc import Iterator

from harness.workload.traces.lengths import IntArray, RecordedLengths

SLOWEST, FASTEST = 0.01, 200.0
"""Requests per second. Published traces of one service have 0.3 (BurstGPT) to 50 (Azure 2024)."""
LONGEST_PROMPT, LONGEST_OUTPUT = 1_000_000, 100_000
"""Mean tokens. Published traces have up to 30,000 in and 2,000 out."""
_FEWEST = 10
"""Fewer requests than this give no meaningful rate."""
_UNITS = ("microseconds", "milliseconds", "seconds", "minutes")


def questions(trace: str, lengths: RecordedLengths, *, is_replay: bool) -> Iterator[str]:
    """Yield questions about lengths, and about the rate if the trace is replayed at its own pace."""
    yield from _question_of_length(trace, "prompt", lengths.prompt_tokens, LONGEST_PROMPT)
    yield from _question_of_length(trace, "output", lengths.output_tokens, LONGEST_OUTPUT)
    if not is_replay or lengths.arrival_s is None or len(lengths) < _FEWEST:
        return
    span_s = float(lengths.arrival_s[-1] - lengths.arrival_s[0])
    rate = (len(lengths) - 1) / span_s if span_s > 0 else float("inf")
    if SLOWEST <= rate <= FASTEST:
        return
    unit = lengths.time_unit
    question = "is that meant?"
    if unit in _UNITS:
        other = _UNITS[_UNITS.index(unit) + (1 if rate > FASTEST else -1)]
        question = f"its timestamps are read as {unit}; are they {other}?"
    yield (
        f"{trace}: {len(lengths):,} requests arrive within {span_s:.3g} s, {rate:.3g} a second, where published traces "
        f"have 0.3 to 50; {question} --rate sets another pace"
    )


def _question_of_length(trace: str, side: str, tokens: IntArray, longest: int) -> Iterator[str]:
    mean = float(tokens.mean())
    if mean > longest:
        yield f"{trace}: the mean {side} has {mean:.3g} tokens; are its lengths in characters or bytes, not in tokens?"

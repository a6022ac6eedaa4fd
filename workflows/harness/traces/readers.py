"""Readers of real traces, one function a format. Each error names the file and the line or record."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import IO, Any

import numpy as np

from fastserve.errors import TraceError
from harness.traces.lengths import ARTIFACT_FILTER, RecordedLengths
from harness.traces.text import TokenCounter

_LONGEST = 2**31 - 1


@dataclass(frozen=True)
class _Row:
    """A request as a file states it; `where` is for errors, `arrival_s` is on the file's own time axis."""

    where: str
    prompt: tuple[str, object]
    output: tuple[str, object]
    arrival_s: float | None = None


def read_azure(path: str) -> RecordedLengths:
    """Read the Azure LLM inference trace (2023): TIMESTAMP, ContextTokens, GeneratedTokens."""

    def rows() -> Iterator[_Row]:
        start: datetime | None = None
        for where, row in _csv_rows(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens")):
            moment, fraction = _moment(where, row["TIMESTAMP"])
            start = start or moment
            # Microseconds, all that datetime holds, would lose the trace's seventh digit: hence the separate fraction.
            arrival_s = (moment - start).total_seconds() + fraction
            yield _Row(where, *_fields(row, "ContextTokens", "GeneratedTokens"), arrival_s)

    return _recorded("azure", path, rows())


def read_burstgpt(path: str) -> RecordedLengths:
    """Read a BurstGPT CSV: Timestamp in seconds, Request tokens, Response tokens; other columns are ignored."""

    def rows() -> Iterator[_Row]:
        for where, row in _csv_rows(path, ("Timestamp", "Request tokens", "Response tokens")):
            if (row["Response tokens"] or "").strip() == "0":
                raise TraceError(
                    f"{where}: 0 Response tokens marks a request that failed; expected successes only: "
                    "use the data set's BurstGPT_without_fails files, or remove such lines"
                )
            arrival_s = _seconds(where, "Timestamp", row["Timestamp"])
            yield _Row(where, *_fields(row, "Request tokens", "Response tokens"), arrival_s)

    return _recorded("burstgpt", path, rows())


def read_csv(path: str) -> RecordedLengths:
    """Read prompt_tokens, output_tokens and, where there is such a column, arrival_s in seconds."""

    def rows() -> Iterator[_Row]:
        for where, row in _csv_rows(path, ("prompt_tokens", "output_tokens")):
            arrival_s = _seconds(where, "arrival_s", row["arrival_s"]) if "arrival_s" in row else None
            yield _Row(where, *_fields(row, "prompt_tokens", "output_tokens"), arrival_s)

    return _recorded("csv", path, rows())


def read_mooncake(path: str) -> RecordedLengths:
    """Read a Mooncake JSONL: timestamp in milliseconds, input_length, output_length; hash_ids are ignored."""

    def rows() -> Iterator[_Row]:
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise TraceError(
                        f"{where}: expected a JSON object, found {_shown(line.strip())} ({error})"
                    ) from error
                for field in ("timestamp", "input_length", "output_length"):
                    _member(where, record, field)
                arrival_s = _seconds(where, "timestamp", record["timestamp"], unit="milliseconds") / 1000
                yield _Row(where, *_fields(record, "input_length", "output_length"), arrival_s)

    return _recorded("mooncake", path, rows())


def read_sharegpt(path: str, counter: TokenCounter) -> RecordedLengths:
    """Read ShareGPT: the first two turns of each conversation, where a human speaks and gpt answers."""
    prompts, outputs = [], []
    records = _json_records(path)
    for where, record in records:
        turns = _member(where, record, "conversations")
        if not isinstance(turns, list):
            raise TraceError(f"{where}: conversations must be a list of turns, not {_shown(turns)}")
        exchange = [(_text(where, turn, "from"), _text(where, turn, "value")) for turn in turns[:2]]
        if [speaker for speaker, _ in exchange] == ["human", "gpt"]:
            prompts.append(exchange[0][1])
            outputs.append(exchange[1][1])
    return _counted("sharegpt", path, len(records), prompts, outputs, counter)


def read_alpaca(path: str, counter: TokenCounter) -> RecordedLengths:
    """Read Alpaca: the prompt is the instruction and, on a line of its own, the input if there is one."""
    prompts, outputs = [], []
    records = _json_records(path)
    for where, record in records:
        parts = _text(where, record, "instruction"), _text(where, record, "input")
        prompts.append("\n".join(filter(None, parts)))
        outputs.append(_text(where, record, "output"))
    return _counted("alpaca", path, len(records), prompts, outputs, counter)


def _recorded(kind: str, path: str, rows: Iterable[_Row]) -> RecordedLengths:
    prompts: list[int] = []
    outputs: list[int] = []
    arrivals: list[float] = []
    for row in rows:
        prompts.append(_tokens(row.where, *row.prompt))
        outputs.append(_tokens(row.where, *row.output))
        if row.arrival_s is None:
            continue
        if arrivals and row.arrival_s < arrivals[-1]:
            raise TraceError(
                f"{row.where}: it arrives {arrivals[-1] - row.arrival_s:g} s before the request above it; "
                "expected lines in order of time"
            )
        arrivals.append(row.arrival_s)
    if not prompts:
        raise TraceError(f"{path}: no requests in it; expected at least one")
    description = f"{kind}:{path}: {len(prompts)} requests, unfiltered"
    return RecordedLengths(description, np.array(prompts), np.array(outputs), np.array(arrivals) if arrivals else None)


def _counted(
    kind: str, path: str, records: int, prompts: list[str], outputs: list[str], counter: TokenCounter
) -> RecordedLengths:
    prompt, output = counter.count(prompts), counter.count(outputs)
    kept = ARTIFACT_FILTER.keeps(prompt, output)
    if not kept.any():
        raise TraceError(
            f"{path}: none of its {records} records is a prompt with an answer that passes the artifact's filter "
            f"(each at least {ARTIFACT_FILTER.min_prompt} tokens, prompt at most {ARTIFACT_FILTER.max_prompt}, "
            f"together at most {ARTIFACT_FILTER.max_total})"
        )
    description = f"{kind}:{path}: {kept.sum()} of {records} records after the artifact's filter; {counter.description}"
    return RecordedLengths(description, prompt[kept], output[kept])


@contextmanager
def _opened(path: str) -> Iterator[IO[str]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield file
    except FileNotFoundError as error:
        raise TraceError(f"{path}: no such file; expected a trace there") from error
    except OSError as error:
        raise TraceError(f"{path}: could not be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not text in UTF-8 ({error.reason} at byte {error.start} of a block)") from error


def _csv_rows(path: str, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str | None]]]:
    with _opened(path) as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        try:
            present = reader.fieldnames or []
            missing = [column for column in columns if column not in present]
            if missing:
                found = f"found {', '.join(present)}" if present else "the file is empty"
                raise TraceError(
                    f"{path}, line 1: no column {', '.join(missing)}; expected {', '.join(columns)}, {found}"
                )
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row:
                    raise TraceError(
                        f"{where}: more fields than the {len(present)} columns; expected {', '.join(present)}"
                    )
                yield where, row
        except csv.Error as error:
            raise TraceError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _json_records(path: str) -> list[tuple[str, Any]]:
    with _opened(path) as file:
        try:
            records = json.load(file)
        except json.JSONDecodeError as error:
            raise TraceError(
                f"{path}, line {error.lineno}: not JSON: {error.msg}; expected a list of records"
            ) from error
    if not isinstance(records, list) or not records:
        raise TraceError(f"{path}: expected a JSON list of at least one record, found {_shown(records)}")
    return [(f"{path}, record {index} (from 0)", record) for index, record in enumerate(records)]


def _member(where: str, record: object, field: str) -> object:
    if not isinstance(record, dict):
        raise TraceError(f"{where}: expected an object with {field!r}, found {_shown(record)}")
    if field not in record:
        raise TraceError(f"{where}: no {field!r}; it has {', '.join(map(str, record)) or 'nothing'}")
    return record[field]


def _text(where: str, record: object, field: str) -> str:
    value = _member(where, record, field)
    if not isinstance(value, str):
        raise TraceError(f"{where}: {field} must be a text, not {_shown(value)}")
    return value


def _fields(row: dict[str, Any], prompt: str, output: str) -> tuple[tuple[str, object], tuple[str, object]]:
    return (prompt, row[prompt]), (output, row[output])


def _tokens(where: str, field: str, value: object) -> int:
    tokens = value if type(value) is int else 0
    if isinstance(value, str):
        digits = value.strip()
        # Not int() alone, which also takes 1_000 and digits of other scripts.
        tokens = int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= 10 else 0
    if not 0 < tokens <= _LONGEST:
        raise TraceError(f"{where}: {field} must be a positive integer, not {_shown(value)}")
    return tokens


def _seconds(where: str, field: str, value: object, unit: str = "seconds") -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise TraceError(f"{where}: {field} must be a number of {unit}, not {_shown(value)}")
    return number


def _moment(where: str, value: str | None) -> tuple[datetime, float]:
    """Split a timestamp into whole seconds and the fraction of a second."""
    # The 2024 edition of the trace adds the time zone, always UTC.
    whole, _, fraction = (value or "").strip().removesuffix("+00:00").partition(".")
    try:
        return datetime.strptime(whole, "%Y-%m-%d %H:%M:%S"), _fraction(fraction)
    except ValueError as error:
        raise TraceError(
            f"{where}: TIMESTAMP must look like 2023-11-16 18:15:46.6805900, not {_shown(value)}"
        ) from error


def _fraction(digits: str) -> float:
    if digits and not (digits.isascii() and digits.isdigit()):
        raise ValueError(digits)
    return float(f"0.{digits}")


def _shown(value: object, limit: int = 60) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


@dataclass(frozen=True)
class LengthReader:
    """A format whose files carry token counts."""

    description: str
    read: Callable[[str], RecordedLengths]


@dataclass(frozen=True)
class TextReader:
    """A format whose files carry text, to be counted."""

    description: str
    read: Callable[[str, TokenCounter], RecordedLengths]


TEXT_READERS = {
    "sharegpt": TextReader("ShareGPT JSON, first two turns; add ,tokenizer=DIR to count real tokens", read_sharegpt),
    "alpaca": TextReader("Alpaca JSON; add ,tokenizer=DIR to count real tokens", read_alpaca),
}
LENGTH_READERS = {
    "azure": LengthReader("Azure LLM inference trace CSV, with timestamps", read_azure),
    "burstgpt": LengthReader("BurstGPT CSV, with timestamps", read_burstgpt),
    "mooncake": LengthReader("Mooncake JSONL, with timestamps", read_mooncake),
    "csv": LengthReader("CSV with prompt_tokens, output_tokens and optionally arrival_s in seconds", read_csv),
}

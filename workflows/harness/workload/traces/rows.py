"""Read files row by row, strictly: an error names the file, the line, the field and the value."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from typing import IO, Any

from fastserve.core.errors import TraceError

LONGEST = 2**31 - 1
"""Upper bound on the tokens of a prompt, and of an output."""


@contextmanager
def opened(path: str) -> Iterator[IO[str]]:
    """Open a text file in UTF-8, with or without a byte order mark. Raises TraceError if opening or reading fails."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield file
    except FileNotFoundError as error:
        raise TraceError(f"{path}: no such file; expected a trace there") from error
    except OSError as error:
        raise TraceError(f"{path}: could not be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not text in UTF-8 ({error.reason} at byte {error.start} of a block)") from error


def csv_header(path: str) -> list[str]:
    """Read the names of the columns; an empty file has none."""
    with _csv_reader(path) as reader:
        return list(reader.fieldnames or [])


def csv_rows(path: str, check_header: Callable[[list[str]], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place of each row and its fields as texts; a field missing at the end of the row is None."""
    with _csv_reader(path) as reader:
        names = list(reader.fieldnames or [])
        check_header(names)
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                raise TraceError(f"{where}: more fields than the {len(names)} columns; expected {listed(names)}")
            yield where, row


def json_rows(path: str) -> Iterator[tuple[str, Any]]:
    """Yield the place and the JSON value of each line that is not blank."""
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TraceError(f"{where}: expected a JSON object, found {shown(line.strip())} ({error})") from error


def member(where: str, record: object, field: str) -> object:
    """Get a field of a JSON object."""
    if not isinstance(record, dict):
        raise TraceError(f"{where}: expected an object with {field!r}, found {shown(record)}")
    if field not in record:
        raise TraceError(f"{where}: no {field!r}; it has {listed(record) or 'nothing'}")
    return record[field]


def read_tokens(where: str, field: str, value: object) -> int:
    """Read a number of tokens, at least 1."""
    number = value if type(value) is int else 0
    if isinstance(value, str):
        digits = value.strip()
        # Not int() alone, which also takes 1_000 and digits of other scripts.
        number = int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= 10 else 0
    if not 0 < number <= LONGEST:
        raise TraceError(f"{where}: {field} must be a positive integer, not {shown(value)}")
    return number


def read_time(where: str, field: str, value: object, unit: str) -> float:
    """Read a finite number of this unit."""
    number = _number(value)
    if not math.isfinite(number):
        raise TraceError(f"{where}: {field} must be a number of {unit}, not {shown(value)}")
    return number


def read_whole_time(where: str, field: str, value: object, unit: str, remedy: str) -> float:
    """Read a whole number of this unit, 3 or 3.0. A fraction means another unit; the error then gives the remedy."""
    number = _number(value)
    if not number.is_integer():
        remedy = f"; {remedy}" if math.isfinite(number) else ""
        raise TraceError(f"{where}: {field} must be a whole number of {unit}, not {shown(value)}{remedy}")
    return number


def read_date(where: str, field: str, value: object) -> tuple[datetime, float]:
    """Read a date and time: whole seconds, and the fraction apart, since a datetime would lose its last digits."""
    # The 2024 edition of the Azure trace adds the time zone, always UTC.
    whole, _, fraction = str(value or "").strip().removesuffix("+00:00").partition(".")
    try:
        return datetime.strptime(whole, "%Y-%m-%d %H:%M:%S"), _fraction(fraction)
    except ValueError as error:
        raise TraceError(f"{where}: {field} must look like 2023-11-16 18:15:46.6805900, not {shown(value)}") from error


def listed(names: Collection[object], limit: int = 12) -> str:
    """Format names for an error; at most `limit`, since a file of another kind may have thousands."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(text if len(text) <= 60 else f"{text[:60]}…" for text in map(str, islice(names, limit))) + more


def shown(value: object, limit: int = 60) -> str:
    """Format a value for an error."""
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


@contextmanager
def _csv_reader(path: str) -> Iterator[csv.DictReader[str]]:
    with opened(path) as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        try:
            yield reader
        except csv.Error as error:
            raise TraceError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _number(value: object) -> float:
    """The number, or NaN if the value is not a number."""
    try:
        return math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _fraction(digits: str) -> float:
    if digits and not (digits.isascii() and digits.isdigit()):
        raise ValueError(digits)
    return float(f"0.{digits}")

"""Files read row by row, strictly: what a value must look like, and where in the file it is if it does not."""

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
"""Tokens a request may have on each side."""


@contextmanager
def opened(path: str) -> Iterator[IO[str]]:
    """Open a text file in UTF-8, with or without a byte order mark. TraceError where that fails, then or later."""
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
    """Read the names of the columns; none of an empty file."""
    with _csv_reader(path) as reader:
        return list(reader.fieldnames or [])


def csv_rows(path: str, check_header: Callable[[list[str]], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each row is, and its fields as texts; None for one that is missing at the end."""
    with _csv_reader(path) as reader:
        names = list(reader.fieldnames or [])
        check_header(names)
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                raise TraceError(f"{where}: more fields than the {len(names)} columns; expected {listed(names)}")
            yield where, row


def json_rows(path: str) -> Iterator[tuple[str, Any]]:
    """Yield where each line is that is not blank, and its JSON value."""
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
    """A field of a JSON object."""
    if not isinstance(record, dict):
        raise TraceError(f"{where}: expected an object with {field!r}, found {shown(record)}")
    if field not in record:
        raise TraceError(f"{where}: no {field!r}; it has {listed(record) or 'nothing'}")
    return record[field]


def tokens(where: str, field: str, value: object) -> int:
    """A number of tokens, at least 1."""
    number = value if type(value) is int else 0
    if isinstance(value, str):
        digits = value.strip()
        # Not int() alone, which also takes 1_000 and digits of other scripts.
        number = int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= 10 else 0
    if not 0 < number <= LONGEST:
        raise TraceError(f"{where}: {field} must be a positive integer, not {shown(value)}")
    return number


def time(where: str, field: str, value: object, unit: str) -> float:
    """A finite number of seconds, or of the unit named."""
    number = _number(value)
    if not math.isfinite(number):
        raise TraceError(f"{where}: {field} must be a number of {unit}, not {shown(value)}")
    return number


def whole_time(where: str, field: str, value: object, unit: str, remedy: str) -> float:
    """A whole number of the unit named, 3 or 3.0; a fraction tells of another unit, for which there is a remedy."""
    number = _number(value)
    if not number.is_integer():
        remedy = f"; {remedy}" if math.isfinite(number) else ""
        raise TraceError(f"{where}: {field} must be a whole number of {unit}, not {shown(value)}{remedy}")
    return number


def moment(where: str, field: str, value: object) -> tuple[datetime, float]:
    """A date and time, in whole seconds, and the fraction of a second, of which a datetime loses digits."""
    # The 2024 edition of the Azure trace adds the time zone, always UTC.
    whole, _, fraction = str(value or "").strip().removesuffix("+00:00").partition(".")
    try:
        return datetime.strptime(whole, "%Y-%m-%d %H:%M:%S"), _fraction(fraction)
    except ValueError as error:
        raise TraceError(f"{where}: {field} must look like 2023-11-16 18:15:46.6805900, not {shown(value)}") from error


def listed(names: Collection[object], limit: int = 12) -> str:
    """Names as an error shows them: those of a file of another kind may be thousands."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(text if len(text) <= 60 else f"{text[:60]}…" for text in map(str, islice(names, limit))) + more


def shown(value: object, limit: int = 60) -> str:
    """A value as an error shows it."""
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
    """NaN for what is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _fraction(digits: str) -> float:
    if digits and not (digits.isascii() and digits.isdigit()):
        raise ValueError(digits)
    return float(f"0.{digits}")

"""Rows of a CSV table, with errors that name the file, the row and the remedy."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from fastserve.core.errors import ConfigError


class Row:
    """One row of a table: texts by column."""

    __slots__ = ("_texts", "line", "path")

    def __init__(self, path: Path, line: int, texts: dict[str, str]) -> None:
        self.path = path
        self.line = line
        """In the file, from 1; the header is the first."""
        self._texts = texts

    def text(self, column: str) -> str:
        """The text in a column."""
        return self._texts[column]

    def integer(self, column: str, least: int = 0) -> int:
        """A whole number of at least `least`. ConfigError for anything else."""
        text = self._texts[column]
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            self.fail(f"{column} is {text!r}; it must be a whole number of at least {least}")
        return value

    def seconds(self, column: str, unit_s: float) -> float:
        """A time above 0, in seconds. ConfigError for anything else."""
        text = self._texts[column]
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            self.fail(f"{column} is {text!r}; a measured time is above 0. Remove the row or measure it again")
        return value * unit_s

    def fail(self, problem: str) -> NoReturn:
        """Raise ConfigError about this row."""
        raise ConfigError(f"{self.path}, row {self.line}: {problem}")


def read_rows(path: Path, columns: Sequence[str], remedy: str) -> Iterator[Row]:
    """Yield the rows of a CSV file with a header.

    ConfigError if the file or one of `columns` is missing, or a row is shorter than the header. `remedy` says where
    such a file comes from.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            missing = [column for column in columns if column not in header]
            if missing:
                raise ConfigError(
                    f"{path}, row 1: no column {missing[0]!r}; it has {', '.join(header) or 'none'}, and needs "
                    f"{', '.join(columns)}. {remedy}"
                )
            for values in reader:
                if len(values) < len(header):
                    raise ConfigError(
                        f"{path}, row {reader.line_num}: {len(values)} values, the header names {len(header)}; "
                        "is the file cut off?"
                    )
                yield Row(path, reader.line_num, dict(zip(header, values, strict=False)))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist. {remedy}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read as CSV in UTF-8: {error}. {remedy}") from None

"""Read a file with token counts once in a process: by columns if all of it is regular, else row by row."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from itertools import islice

import numpy as np

from fastserve.core.errors import TraceError
from harness.workload.traces.formats import FORMATS, LengthFormat
from harness.workload.traces.lengths import Columns, RecordedLengths

_KEPT = 8
_read: dict[Hashable, RecordedLengths] = {}


def read_lengths(format_: LengthFormat, path: str, first: int | None = None) -> RecordedLengths:
    """Read a file of a format with token counts, or only its first requests.

    Raises TraceError, naming the line, if the file is malformed.
    """
    from harness.workload.traces.columns import read_columns  # Imports pyarrow, which built-in traces do not need.

    is_regular = os.path.isfile(path)  # A pipe, for one, can be read only once.
    columns = (read_columns(format_, path, first) if is_regular else None) or read_rows(format_, path, first)
    if not len(columns.prompt):
        raise TraceError(f"{path}: no requests in it; expected at least one")
    locate = partial(_locate, format_.kind, path) if is_regular else "request {} (from 0)".format
    number = f"{'the first ' if first is not None else ''}{len(columns.prompt)} requests"
    return RecordedLengths(f"{format_.kind}:{path}: {number}, unfiltered", *columns, format_.clock.value, locate)


def read_rows(format_: LengthFormat, path: str, first: int | None = None) -> Columns:
    """Read a file row by row: slower than `read_columns`, with the same result, or the TraceError that says why not."""
    rows = list(islice(format_.rows(path), first))
    arrivals = [row.arrival_s for row in rows if row.arrival_s is not None]
    return Columns(
        np.array([row.prompt for row in rows]),
        np.array([row.output for row in rows]),
        np.array(arrivals) if arrivals else None,
    )


def read_once(path: str, *how: Hashable, read: Callable[[], RecordedLengths]) -> RecordedLengths:
    """Call `read`, or return its earlier result in this process for the same unchanged file, read in the same way."""
    try:
        stat = os.stat(path)
    except OSError:
        return read()  # Which raises the error.
    if not os.path.isfile(path):
        return read()
    key = (os.path.realpath(path), stat.st_mtime_ns, stat.st_size, stat.st_ino, *how)
    if key not in _read:
        lengths = read()
        while len(_read) >= _KEPT:
            del _read[next(iter(_read))]
        _read[key] = lengths
    return _read[key]


def files_read() -> Mapping[Hashable, RecordedLengths]:
    """The files that this process has read, for another process to take over."""
    return dict(_read)


def take_over(files: Mapping[Hashable, RecordedLengths]) -> None:
    """Use the files that another process has read."""
    _read.update(files)


def _locate(kind: str, path: str, index: int) -> str:
    return next(islice(FORMATS[kind].rows(path), index, None)).where

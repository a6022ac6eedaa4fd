"""Reading a file of request lengths: row by row (as until now, and still for what is unusual) and at once.

Files of --lines requests are made in a temporary folder. `all` reads every line, as sampling needs; `first` reads what
a replay of 100 requests needs. Both readers take turns and must give the same arrays.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from harness.workload.traces.columns import read_columns
from harness.workload.traces.formats import FORMATS, Clock, LengthFormat
from harness.workload.traces.lengths import Columns
from harness.workload.traces.reading import read_rows

FIRST = 100
START = np.datetime64("2023-11-16T18:15:46.680590")


def write(format_: LengthFormat, path: Path, num_lines: int) -> None:
    """Make a file of the format: Poisson arrivals at 5 requests/s, prompts of 2,000 tokens and outputs of 400."""
    rng = np.random.default_rng(0)
    arrival_s = np.cumsum(rng.exponential(0.2, num_lines))
    rows = zip(arrival_s, rng.integers(1, 4000, num_lines), rng.integers(1, 800, num_lines), strict=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json_lines(format_, rows) if format_.is_json else csv_lines(format_, rows))


def csv_lines(format_: LengthFormat, rows: Iterator[tuple[float, int, int]]) -> Iterator[str]:
    """The header and the rows."""
    yield f"{format_.time},{format_.prompt},{format_.output}\n"
    for at, prompt, output in rows:
        date = str(START + np.timedelta64(int(at * 1e6), "us")).replace("T", " ")
        yield f"{f'{date}0' if format_.clock is Clock.DATE else f'{at:.3f}'},{prompt},{output}\n"


def json_lines(format_: LengthFormat, rows: Iterator[tuple[float, int, int]]) -> Iterator[str]:
    """A request a line, with the ids of its blocks of 512 tokens."""
    for at, prompt, output in rows:
        moment = int(at * 1000) if format_.clock is Clock.MILLISECONDS else round(at, 3)
        record = {format_.time: moment, format_.prompt: int(prompt), format_.output: int(output)}
        record |= {format_.mark: 1} if format_.mark else {}
        yield json.dumps(record | {"hash_ids": list(range(int(prompt) // 512 + 1))}) + "\n"


def seconds(read: Callable[[], Columns | None]) -> tuple[float, Columns]:
    """How long it takes, and what it gives."""
    began = time.perf_counter()
    columns = read()
    elapsed = time.perf_counter() - began
    assert columns is not None
    return elapsed, columns


def main() -> None:
    """Print the median times and their ratio, by format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for kind, format_ in FORMATS.items():
            path = Path(folder) / kind
            write(format_, path, options.lines)
            for what, first in (("all", None), ("first", FIRST)):
                by_row, at_once = [], []
                for _ in range(options.repeats):
                    row_s, rows = seconds(lambda p=str(path), f=format_: read_rows(f, p))
                    column_s, columns = seconds(lambda p=str(path), f=format_, n=first: read_columns(f, p, n))
                    for one, other in zip(rows, columns, strict=True):
                        np.testing.assert_array_equal(one[:first], other)
                    by_row.append(row_s)
                    at_once.append(column_s)
                row_s, column_s = statistics.median(by_row), statistics.median(at_once)
                print(
                    f"{kind:10} {options.lines:,} lines, {what:5}: row by row {row_s:7.3f} s, "
                    f"at once {column_s:7.4f} s, ratio {row_s / column_s:,.0f}",
                    flush=True,
                )
            path.unlink()


if __name__ == "__main__":
    main()

"""The four files of a run: requests.parquet, iterations.parquet, summary.json, meta.json."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastserve.core.errors import OutputError
from fastserve.core.files import put_in_place
from fastserve.engine import IterationLog, IterationRecord, RequestMetrics
from harness.run.replaced import replacement_note
from harness.run.summary import is_finite

if TYPE_CHECKING:
    from harness.client.answer import Exchange

REQUEST_COLUMNS = {
    "request_id": pa.string(),
    "status": pa.string(),
    "arrival_s": pa.float64(),
    "first_scheduled_s": pa.float64(),
    "first_token_s": pa.float64(),
    "finished_s": pa.float64(),
    "prompt_tokens": pa.int64(),
    "output_tokens": pa.int64(),
    "queueing_s": pa.float64(),
    "swapping_s": pa.float64(),
    "execution_s": pa.float64(),
    "preemptions": pa.int64(),
    "swap_out_bytes": pa.int64(),
    "swap_in_bytes": pa.int64(),
    "recomputed_tokens": pa.int64(),
    "cached_tokens": pa.int64(),
}
CLIENT_COLUMNS = {
    "sent_s": pa.float64(),
    "token_s": pa.list_(pa.float64()),
    "event_tokens": pa.list_(pa.int64()),
}
"""Further columns of a run over HTTP: the time at which a request was sent, the time of each event with a token, and
the number of tokens in each of these events (null if the server does not say)."""


def request_table(
    metrics: Sequence[RequestMetrics | Exchange], columns: Mapping[str, pa.DataType] = REQUEST_COLUMNS
) -> pa.Table:
    """Make a row per request, in the order given. Times that do not exist, and values a client cannot see, are null."""
    return pa.table({name: _column([getattr(row, name) for row in metrics], type_) for name, type_ in columns.items()})


def iteration_table(iterations: IterationLog) -> pa.Table:
    """Make a row per computed iteration."""
    return pa.table(
        {
            name: _column(column, pa.float64() if name.endswith("_s") else pa.int64())
            for name, column in zip(IterationRecord._fields, iterations.columns(), strict=True)
        }
    )


def _column(values: Sequence[Any], type_: pa.DataType) -> pa.Array:
    """Make a column; NaN and None are null.

    Numbers and texts are put into buffers here: `pa.array` imports pandas, which takes longer than a short simulation.
    """
    buffers: list[pa.Buffer | None]
    if type_ == pa.float64():
        numbers = np.array(values, dtype=float)
        missing = np.isnan(numbers)
        known = pa.py_buffer(np.packbits(~missing, bitorder="little")) if missing.any() else None
        buffers = [known, pa.py_buffer(numbers)]
    elif type_ == pa.int64() and None not in values:
        buffers = [None, pa.py_buffer(np.array(values, dtype=np.int64))]
    elif type_ == pa.string():
        texts = [value.encode() for value in values]
        ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
        buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(texts))]
    else:
        return pa.array(values, type_, from_pandas=True)
    return pa.Array.from_buffers(type_, len(values), buffers)


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """Say how pyarrow.parquet writes such a table: compressed, and times split into their bytes.

    Successive times have their first bytes in common, so a file becomes a third smaller, and is written faster.
    """
    times = [field.name for field in schema if pa.types.is_floating(field.type)]
    return {
        "compression": "zstd",
        "use_dictionary": [name for name in schema.names if name not in times],
        "column_encoding": dict.fromkeys(times, "BYTE_STREAM_SPLIT"),
    }


class RunFolder:
    """The folder of a run. Making it checks that it can be written; `write` puts all files into it, or none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tables: dict[str, pq.ParquetWriter] = {}
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=path))
        except OSError as error:
            raise OutputError(f"cannot write to output folder {path}: {error.strerror}") from error

    def append(self, name: str, rows: pa.Table) -> None:
        """Append rows to `name`.parquet beside the old file; the first have its columns. Raises OutputError."""
        with self._keeping_earlier_results():
            if name not in self._tables:
                self._tables[name] = pq.ParquetWriter(
                    self._staging / f"{name}.parquet", rows.schema, **parquet_options(rows.schema)
                )
            self._tables[name].write_table(rows)

    def write(self, summary: dict[str, Any], meta: dict[str, Any]) -> str:
        """Write the two JSON files, then replace the old files by all new ones. Raises OutputError if that fails.

        Returns a note if the old files were of another configuration, else an empty text.
        """
        staging = self._staging
        meta = _with_finite_numbers(meta)
        note = replacement_note(self.path / "meta.json", meta, "configuration")
        with self._keeping_earlier_results():
            for table in self._tables.values():
                table.close()
            (staging / "meta.json").write_text(_json(meta), encoding="utf-8")
            (staging / "summary.json").write_text(_json(summary), encoding="utf-8")
            for name in (*(f"{table}.parquet" for table in self._tables), "meta.json", "summary.json"):
                put_in_place(staging / name, self.path / name)
        return note

    @contextmanager
    def _keeping_earlier_results(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"cannot write the results to {self.path}: {error.strerror}; earlier results there were kept"
            ) from error

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # Of a full disk, which `append` has reported.
            for table in self._tables.values():
                table.close()
        shutil.rmtree(self._staging, ignore_errors=True)


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _with_finite_numbers(content: Any) -> Any:
    """Turn infinite options into text, as they would be given: JSON has no infinity."""
    if isinstance(content, dict):
        return {key: _with_finite_numbers(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_with_finite_numbers(value) for value in content]
    return content if is_finite(content) else str(content)

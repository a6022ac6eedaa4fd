"""Request lengths by name: `sharegpt`, `zipf:theta=1.2`, or a real file as `kind:path`."""

from __future__ import annotations

from fastserve.core.errors import ConfigError
from harness.workload.traces.builtin import BUILTIN
from harness.workload.traces.conversations import TEXT_FORMATS, TextFormat
from harness.workload.traces.formats import FORMATS, LengthFormat
from harness.workload.traces.lengths import (
    ARTIFACT_FILTER,
    CLIENT_FILTER,
    LengthFilter,
    LengthSource,
    RecordedLengths,
    length_statistics,
)
from harness.workload.traces.reading import read_lengths, read_once
from harness.workload.traces.text import token_counter

__all__ = [
    "ARTIFACT_FILTER",
    "CLIENT_FILTER",
    "LengthFilter",
    "LengthSource",
    "RecordedLengths",
    "is_file_trace",
    "length_statistics",
    "list_traces",
    "load_trace",
]

_TOKENIZER_OPTION = ",tokenizer="


def load_trace(spec: str, tokenizer: str | None = None, first: int | None = None) -> LengthSource:
    """Open a trace: a built-in name with its options, or `kind:path` for a file, which a process reads once.

    Text (`sharegpt:x.json`, `alpaca:x.json`) is counted with the tokenizer of the specification's `,tokenizer=DIR` or
    of directory `tokenizer`; without either, lengths are approximated and described so. Other traces hold lengths and
    need no tokenizer. With `first`, only that many requests of a file with timestamps are read, from its beginning.
    Raises ConfigError for an unknown specification, TraceError for a malformed file.
    """
    name, colon, rest = spec.strip().partition(":")
    if colon and name in TEXT_FORMATS:
        path, _, own_tokenizer = rest.partition(_TOKENIZER_OPTION)
        counted_by = own_tokenizer or tokenizer
        text_format = TEXT_FORMATS[name]
        return read_once(
            _path(spec, path), name, counted_by, read=lambda: text_format.read(path, token_counter(counted_by))
        )
    if colon and name in FORMATS:
        if _TOKENIZER_OPTION in rest:
            raise ConfigError(f"trace {spec!r}: {name} files carry token counts; a tokenizer does not apply")
        return read_once(_path(spec, rest), name, first, read=lambda: read_lengths(FORMATS[name], rest, first))
    if name in BUILTIN:
        return BUILTIN[name].open(rest)
    names, kinds = ", ".join(BUILTIN), ", ".join(f"{kind}:PATH" for kind in (*TEXT_FORMATS, *FORMATS))
    raise ConfigError(f"unknown trace {spec!r}; built in: {names}; files: {kinds}")


def is_file_trace(spec: str) -> bool:
    """Whether the specification is `kind:path`."""
    name, colon, _ = spec.strip().partition(":")
    return bool(colon) and (name in TEXT_FORMATS or name in FORMATS)


def list_traces() -> list[tuple[str, str]]:
    """List (name, description) of every built-in trace and every kind of file."""
    formats: dict[str, TextFormat | LengthFormat] = {**TEXT_FORMATS, **FORMATS}
    return [(builtin.usage, builtin.description) for builtin in BUILTIN.values()] + [
        (f"{kind}:PATH", each.description) for kind, each in formats.items()
    ]


def _path(spec: str, path: str) -> str:
    if not path:
        raise ConfigError(f"trace {spec!r}: a file's path must follow the colon")
    return path

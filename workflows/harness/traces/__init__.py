"""Request lengths by name: `sharegpt`, `zipf:theta=1.2`, or a real file as `kind:path`."""

from __future__ import annotations

from fastserve.errors import ConfigError
from harness.traces.builtin import BUILTIN
from harness.traces.lengths import ARTIFACT_FILTER, LengthFilter, LengthSource, RecordedLengths, length_statistics
from harness.traces.readers import LENGTH_READERS, TEXT_READERS, LengthReader, TextReader
from harness.traces.text import token_counter

__all__ = [
    "ARTIFACT_FILTER",
    "LengthFilter",
    "LengthSource",
    "RecordedLengths",
    "length_statistics",
    "list_traces",
    "load_trace",
]

_TOKENIZER_OPTION = ",tokenizer="


def load_trace(spec: str, tokenizer: str | None = None) -> LengthSource:
    """Open a trace: a built-in name with its options, or `kind:path` for a file.

    Text (`sharegpt:x.json`, `alpaca:x.json`) is counted with the tokenizer in directory `tokenizer`, or in the
    specification's own `,tokenizer=DIR`, which wins; without either, lengths are approximated and described so.
    Other traces carry lengths and leave `tokenizer` unused.
    Raises ConfigError for a specification that is not understood, TraceError for a bad file.
    """
    name, colon, rest = spec.strip().partition(":")
    if colon and name in TEXT_READERS:
        path, _, own_tokenizer = rest.partition(_TOKENIZER_OPTION)
        return TEXT_READERS[name].read(_path(spec, path), token_counter(own_tokenizer or tokenizer))
    if colon and name in LENGTH_READERS:
        if _TOKENIZER_OPTION in rest:
            raise ConfigError(f"trace {spec!r}: {name} files carry token counts; a tokenizer does not apply")
        return LENGTH_READERS[name].read(_path(spec, rest))
    if name in BUILTIN:
        return BUILTIN[name].open(rest)
    names, kinds = ", ".join(BUILTIN), ", ".join(f"{kind}:PATH" for kind in (*TEXT_READERS, *LENGTH_READERS))
    raise ConfigError(f"unknown trace {spec!r}; built in: {names}; files: {kinds}")


def list_traces() -> list[tuple[str, str]]:
    """Give (name, description) of every built-in trace and every kind of file."""
    readers: dict[str, TextReader | LengthReader] = {**TEXT_READERS, **LENGTH_READERS}
    return [(builtin.usage, builtin.description) for builtin in BUILTIN.values()] + [
        (f"{kind}:PATH", reader.description) for kind, reader in readers.items()
    ]


def _path(spec: str, path: str) -> str:
    if not path:
        raise ConfigError(f"trace {spec!r}: a file's path must follow the colon")
    return path

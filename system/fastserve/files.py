"""Writing files so that a reader sees the old one or the whole new one, never a part."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastserve.errors import OutputError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes the place of `path` at the end, or goes if anything fails.

    Raises OutputError where the file cannot be written.
    """
    staging = path.with_name(f".writing-{path.name}")
    try:
        yield staging
        os.replace(staging, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    finally:
        staging.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise OutputError if no file can be written to `path`, whose folder is made if missing: before long work, say."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error

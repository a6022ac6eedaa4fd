"""Writing files so that a reader sees the old one or the whole new one, never a part."""

from __future__ import annotations

import os
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

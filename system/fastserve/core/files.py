"""Write files so that a reader sees the old content or the whole new one, never a part.

A regular file is replaced; for a symbolic link, the file that it points to. A device, a pipe or an open file
(`/dev/null`, a fifo, `/dev/stdout`) is written to, once the content is complete. A folder is an error.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastserve.core.errors import OutputError

_OPEN_FILES = ("/dev/", "/proc/")
"""Symbolic links below these folders are open files of a process."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a path to write to. At the end its content becomes that of `path`; after an error it is deleted.

    Raises OutputError if the file cannot be written.
    """
    try:
        if _is_written_to(path):
            with tempfile.TemporaryDirectory(prefix="fastserve-") as folder:
                staging = Path(folder) / path.name
                yield staging
                put_in_place(staging, path)
            return
        target = Path(os.path.realpath(path))
        staging = target.with_name(f".writing-{target.name}")
        try:
            yield staging
            put_in_place(staging, target)
        finally:
            staging.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def put_in_place(staging: Path, path: Path) -> None:
    """Replace the content of `path` by the file `staging`, which is on the same file system. Raises OSError."""
    if not _is_written_to(path):
        os.replace(staging, os.path.realpath(path))
        return
    with staging.open("rb") as source, path.open("wb") as device:
        shutil.copyfileobj(source, device)


def check_writable(path: Path) -> None:
    """Raise OutputError if `path` cannot be written; makes its folder if it is missing. Call it before long work."""
    try:
        if _is_written_to(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def _is_written_to(path: Path) -> bool:
    """Whether to write to the file instead of replacing it: it is not regular, or open. OSError for a folder."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    return not stat.S_ISREG(mode) or (path.is_symlink() and os.path.abspath(path).startswith(_OPEN_FILES))

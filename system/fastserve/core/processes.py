"""Child processes that end with their parent, even if that is killed by SIGKILL."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection

from fastserve.core.errors import WorkerError

_HOLDER = """
import os, signal, sys
for group in sys.stdin.read().split():  # When the other end is closed.
    try:
        os.killpg(int(group), signal.SIGKILL)
    except OSError:
        pass
"""


@contextmanager
def worker_pool(count: int, prepare: Callable[[], None] | None = None) -> Iterator[ProcessPoolExecutor]:
    """Spawn `count` worker processes, each of which first calls `prepare`, if given.

    They are killed when the context is left, even if they still compute. Raises WorkerError if a worker ends by
    itself, for example killed by the system for want of memory.
    """
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    with reader, ProcessPoolExecutor(count, context, _begin, (reader, prepare)) as pool, writer:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise WorkerError(
                "a worker process ended by itself, perhaps killed for want of memory; choose fewer requests"
            ) from error


class Leash:
    """Kills process groups by SIGKILL if this process ends before it has closed the leash.

    A small helper process waits for that at the other end of a pipe. A process started with `start_new_session` leads
    a group with its pid, to which its children belong.
    """

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _HOLDER],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._close = weakref.finalize(self, _end_holder, self._holder)

    def hold(self, group: int) -> None:
        """Kill this process group when this process ends."""
        assert self._holder.stdin is not None
        with suppress(OSError):  # The helper process was killed.
            self._holder.stdin.write(f"{group}\n".encode())
            self._holder.stdin.flush()

    def close(self) -> None:
        """Stop guarding the groups, after they have ended. A second call does nothing."""
        self._close()


def _begin(reader: Connection, prepare: Callable[[], None] | None) -> None:
    """Initialize a worker: let it end when the parent closes the pipe, and without a traceback at Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def wait() -> None:
        with suppress(EOFError, OSError):
            reader.recv_bytes()
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()
    if prepare is not None:
        prepare()


def _end_holder(holder: subprocess.Popen[bytes]) -> None:
    holder.kill()
    holder.wait()
    assert holder.stdin is not None
    holder.stdin.close()

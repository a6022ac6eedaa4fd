"""Processes that run functions as ranks of a process group. They cost seconds to start, so many tests share them."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_S = 60.0


class RankProcesses:
    """`run` has some of them run a function together.

    Args:
        count: of processes.
        directory: for the files by which they meet.
    """

    def __init__(self, count: int, directory: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._directory = directory
        self._num_runs = 0
        self._pipes, self._processes = [], []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
        """What `function(rank, store, *args)` returns on each rank; AssertionError with what one of them raised."""
        path = str(self._directory / f"store-{self._num_runs}")
        self._num_runs += 1
        pipes = self._pipes[:world_size]
        for rank, pipe in enumerate(pipes):
            pipe.send((function, rank, world_size, path, args))
        answers = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(2 * TIMEOUT_S), f"rank {rank} does not answer"
            answers.append(pipe.recv())
        failed = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
        assert not failed, "\n".join(failed)
        return [result for _, result in answers]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()


def _serve(pipe: Connection) -> None:
    import torch
    from torch.distributed import FileStore

    torch.set_num_threads(1)
    with closing(pipe):
        while (task := pipe.recv()) is not None:
            function, rank, world_size, path, args = task
            try:
                pipe.send(("", function(rank, FileStore(path, world_size), *args)))
            except Exception:
                pipe.send((traceback.format_exc(), None))

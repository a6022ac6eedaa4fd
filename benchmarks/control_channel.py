"""What the control channel costs an iteration: from the engine's telling its ranks to the tokens' being there.

Real ranks but for their worker, which computes nothing and takes no time, over loopback TCP, with the sequences of a
decode batch. The target is a median of at most 200 us. Printed beside it, since it says how fast this machine wakes
processes just then: the round trip of a message of the same size between two processes that do nothing else.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from fastserve.core.config import EngineOptions, ModelSource
from fastserve.core.parallel import ParallelConfig
from fastserve.core.presets import preset
from fastserve.core.request import SamplingParams
from fastserve.runtime.executors.ranks import RankGroup
from fastserve.runtime.models import SequenceInput
from fastserve.runtime.models.source import model_digest
from fastserve.runtime.parallel.channel import Channel
from fastserve.runtime.worker.protocol import RankConfig, run_frame
from fastserve.runtime.worker.rank import Identity, Rank
from fastserve.runtime.worker.runner import Computed

MODEL, BLOCK_SIZE, CONTEXT = "opt-125m", 16, 512


class IdleRank(Rank):
    """A rank whose worker gives tokens at once: the positions of the sequences."""

    def compute(self, sequences: Sequence[SequenceInput]) -> list[int]:
        """The tokens."""
        return [one.start for one in sequences]

    def _load(self) -> None:
        message = self._next_message()
        assert message is not None
        self._timeout_s = message.fields["timeout_s"]
        shape = RankConfig.from_fields(message.fields).parallel
        config = preset(MODEL)
        self._channel.send("configured", digest=model_digest(config, None), gpu_blocks=1, host_blocks=0)
        self._next_message()
        self._worker: Any = SimpleNamespace(
            launch=lambda sequences, *_: lambda: Computed(self.compute(sequences)),
            place=shape.place(self._identity.rank, config),
        )
        self._channel.send("ready")


def serve(kind: type[IdleRank], rank: int, world_size: int, port: int) -> None:
    """The process of a rank."""
    identity = Identity(rank, world_size, rank, "")
    kind(Channel(_connected(port), 8.0), identity, None, None).serve()
    os._exit(0)


@contextmanager
def idle_ranks(kind: type[IdleRank], tensor: int, batch: int, timeout_s: float = 8.0) -> Iterator[RankGroup]:
    """A group of as many ranks of that kind, each a process."""
    port = _free_port()
    spawn = multiprocessing.get_context("spawn").Process
    processes = [spawn(target=serve, args=(kind, rank, tensor, port), daemon=True) for rank in range(tensor)]
    for process in processes:
        process.start()
    config = RankConfig(
        ModelSource(MODEL, "dummy"),
        ParallelConfig(tensor),
        EngineOptions(batch, block_size=BLOCK_SIZE, num_gpu_blocks=1, num_host_blocks=0),
        timeout_s=timeout_s,
    )
    group = RankGroup(config, address=f"127.0.0.1:{port}")
    try:
        yield group
    finally:
        group.close()
        for process in processes:
            process.join(10)
            process.kill()


def decode_batch(batch: int) -> list[SequenceInput]:
    """One token each at the context."""
    return [SequenceInput([7], CONTEXT, list(range(CONTEXT // BLOCK_SIZE + 1))) for _ in range(batch)]


def echo(port: int) -> None:
    """Answer every message with a short one."""
    connection = _connected(port)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while connection.recv(1 << 16):
        connection.sendall(bytes(200))


def round_trips(num_bytes: int, iterations: int) -> list[float]:
    """Seconds of a bare exchange with another process."""
    with socket.create_server(("127.0.0.1", port := _free_port())) as server:
        process = multiprocessing.get_context("spawn").Process(target=echo, args=(port,), daemon=True)
        process.start()
        connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    seconds = []
    with connection:
        for _ in range(iterations):
            began = time.perf_counter()
            connection.sendall(bytes(num_bytes))
            connection.recv(1 << 16)
            seconds.append(time.perf_counter() - began)
    process.join()
    return seconds[iterations // 10 :]


def iteration_times(ranks: int, batch: int, iterations: int) -> list[float]:
    """Seconds of each iteration."""
    sequences, sampling, seconds = decode_batch(batch), [SamplingParams()] * batch, []
    with idle_ranks(IdleRank, ranks, batch) as group:
        for _ in range(iterations):
            began = time.perf_counter()
            tokens = group.execute(sequences, sampling)
            seconds.append(time.perf_counter() - began)
            assert tokens == [CONTEXT] * batch
    return seconds[iterations // 10 :]


def _connected(port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            time.sleep(0.1)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def main() -> None:
    """Print what an iteration costs, by ranks and batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64])
    arguments = parser.parse_args()
    for ranks in arguments.ranks:
        for batch in arguments.batch:
            seconds = iteration_times(ranks, batch, arguments.iterations)
            num_bytes = len(run_frame(0, decode_batch(batch), [SamplingParams()] * batch))
            bare = np.median(round_trips(num_bytes, arguments.iterations)) * 1e6
            median, p99 = np.percentile(seconds, [50, 99]) * 1e6
            print(
                f"{ranks} ranks on {os.cpu_count()} cores, batch {batch}, context {CONTEXT}: median {median:.0f} us, "
                f"P99 {p99:.0f} us an iteration; a bare round trip of {num_bytes} bytes {bare:.0f} us"
            )


if __name__ == "__main__":
    main()

"""What the control channel costs an iteration: from the engine's telling its ranks to the tokens' being there.

Real ranks but for their worker, which computes nothing and takes no time, over loopback TCP, with the sequences of a
decode batch. Printed are the medians and 99th percentiles over many iterations, with one rank, as many as there are
cores, and four; the target is at most 200 us.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from fastserve.executor.ranks import RankGroup
from fastserve.models import SequenceInput
from fastserve.parallel.channel import Channel
from fastserve.parallel.layout import ParallelConfig
from fastserve.presets import preset
from fastserve.request import SamplingParams
from fastserve.worker.protocol import RankConfig
from fastserve.worker.rank import Identity, Rank

MODEL, BLOCK_SIZE, CONTEXT = "opt-125m", 16, 512


class IdleRank(Rank):
    """A rank whose worker gives the tokens at once."""

    def _load(self) -> None:
        config = ParallelConfig(self._next_message().fields["tensor_parallel_size"])  # type: ignore[union-attr]
        self._channel.send("configured", digest=DIGEST, gpu_blocks=1, host_blocks=0)
        self._next_message()

        def launch(sequences: Sequence[SequenceInput], _: object) -> Callable[[], list[int]]:
            return lambda: [one.start for one in sequences]

        place = config.place(self._identity.rank, preset(MODEL))
        self._worker: Any = SimpleNamespace(launch=launch, place=place)
        self._channel.send("ready")


def _digest() -> str:
    from fastserve.models.source import model_digest

    return model_digest(preset(MODEL), None)


DIGEST = _digest()


def serve(rank: int, world_size: int, port: int) -> None:
    """A rank's process."""
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port))
            break
        except OSError:
            time.sleep(0.1)
    identity = Identity(rank, world_size, rank, "")
    IdleRank(Channel(connection, 8.0), identity, None, None).serve()
    os._exit(0)


def measure(world_size: int, batch: int, iterations: int) -> np.ndarray:
    """Seconds of each iteration."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    processes = [
        multiprocessing.get_context("spawn").Process(target=serve, args=(rank, world_size, port), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    config = RankConfig(
        MODEL, "dummy", "cpu", "float32", 0, BLOCK_SIZE, batch, 2048, None, world_size, 1, None, world_size, None, 8.0
    )
    group = RankGroup(config, address=f"127.0.0.1:{port}", num_gpu_blocks=1, num_host_blocks=0)
    sequences = [SequenceInput([7], CONTEXT, list(range(CONTEXT // BLOCK_SIZE + 1))) for _ in range(batch)]
    sampling = [SamplingParams()] * batch
    seconds = []
    for _ in range(iterations):
        began = time.perf_counter()
        tokens = group.execute(sequences, sampling)
        seconds.append(time.perf_counter() - began)
        assert tokens == [CONTEXT] * batch
    group.close()
    for process in processes:
        process.join()
    return np.array(seconds[iterations // 10 :])


def main() -> None:
    """Print what an iteration costs, by ranks and batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--ranks", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1, 4}))
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64])
    arguments = parser.parse_args()
    for world_size in arguments.ranks:
        for batch in arguments.batch:
            seconds = measure(world_size, batch, arguments.iterations)
            median, p99 = np.percentile(seconds, [50, 99]) * 1e6
            print(
                f"{world_size} ranks on {os.cpu_count()} cores, batch {batch}, context {CONTEXT}: "
                f"median {median:.0f} us, P99 {p99:.0f} us an iteration"
            )


if __name__ == "__main__":
    main()

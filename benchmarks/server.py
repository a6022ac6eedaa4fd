"""What the HTTP layer adds to a token, and whether any is lost: many streams of a simulated engine in real time.

A simulated engine makes 16 tokens every 32 ms, 500 tokens/s, for 1,000 clients who all have a stream open; a token is
its number. The clients are another process, so that server and clients have a core each. The overhead of a token is the
time from its being there, in the engine's thread, to its having been read from the client's socket: the event loop,
detokenizing, JSON, both ends of the connection. The target is 1 ms at the 99th percentile.

Beside it, what this machine does to the same messages just then: *bare* is a process that does nothing but write
sixteen of them to as many sockets every 32 ms, to the same client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import uvloop

from fastserve.core.clock import WallClock
from fastserve.core.config import EngineOptions
from fastserve.engine import Job, Observer, Observers
from fastserve.latency import DecodeFit, FittedLatency, HostLink, PrefillFit, Profile
from fastserve.server.engine.thread import EngineThread
from fastserve.server.model import ServedModel
from fastserve.server.monitoring.metrics import ServerMetrics
from fastserve.server.monitoring.state import RecentRequests
from fastserve.server.options import ServerOptions
from fastserve.server.serve import bound_socket, run_server
from fastserve.server.service import Server
from fastserve.server.text.codec import TextCodec
from fastserve.simulation import simulated_engine

BATCH, ITERATION_S, PROMPT = 16, 0.032, 8
TOKENS_PER_S = BATCH / ITERATION_S
_EVENT = re.compile(rb'"token_ids": \[(\d+)\]')
_ID = re.compile(rb'"id": "(cmpl-[0-9a-f]+)"')

PROFILE = Profile(
    name="benchmark",
    model="none",
    hardware="none",
    engine="simulated",
    dtype="float16",
    tensor_parallel_size=1,
    pipeline_parallel_size=1,
    stage=FittedLatency(PrefillFit(ITERATION_S, 0.0, 0.0), (DecodeFit(ITERATION_S, 0.0, 0.0),)),
    kv_capacity_tokens=65_536,
    kv_bytes_per_token=800_000,
    host_link=HostLink(25e9, 0.0),
    provenance={},
)


class Stamps(Observer):
    """Notes when each token was there."""

    def __init__(self) -> None:
        self.rows: dict[str, list[float]] = {}

    def on_token(self, job: Job, token: int, at_s: float, previous_s: float | None) -> None:
        """In the engine's thread."""
        self.rows.setdefault(job.request.request_id, []).append(time.perf_counter())


def serve(policy: str, pipe: Connection) -> None:
    """The server's process: says its port, serves, and says when each token was there."""
    stamps, metrics, recent = Stamps(), ServerMetrics(), RecentRequests()

    def build() -> ServedModel:
        engine = simulated_engine(PROFILE, policy, options=EngineOptions(max_batch_size=BATCH), clock=WallClock())
        return ServedModel("simulated", engine, TextCodec(), None, engine.executor.close)

    thread = EngineThread(build, Observers(metrics, recent, stamps))
    with bound_socket("127.0.0.1", 0) as listener:
        pipe.send(listener.getsockname()[1])
        uvloop.run(run_server(Server(ServerOptions(page=False), thread, metrics, recent), listener))
    thread.stop()
    pipe.send({request_id.removesuffix("-0"): times for request_id, times in stamps.rows.items()})


def write_bare(num_streams: int, num_rounds: int, pipe: Connection) -> None:
    """A process that writes messages like the server's, and says when."""
    message = b'data: {"id": "%s", "choices": [{"index": 0, "token_ids": [%d], "x": "' + b"x" * 130 + b'"}]}\n\n'

    async def run() -> dict[str, list[float]]:
        writers: list[asyncio.StreamWriter] = []
        ready = asyncio.Event()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(asyncio.IncompleteReadError):  # Somebody who only looked whether we are there.
                await reader.readuntil(b"\r\n\r\n")
                writers.append(writer)
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            if len(writers) == num_streams:
                ready.set()

        server = await asyncio.start_server(connected, "127.0.0.1", 0, backlog=2048)
        pipe.send(server.sockets[0].getsockname()[1])
        await ready.wait()
        times: dict[str, list[float]] = {}
        for i in range(num_rounds):
            await asyncio.sleep(ITERATION_S)
            for k in range(BATCH):
                stream = (i * BATCH + k) % num_streams
                name = f"cmpl-{stream:024x}"
                of_stream = times.setdefault(name, [])
                of_stream.append(time.perf_counter())
                writers[stream].write(message % (name.encode(), len(of_stream) - 1))
        for writer in writers:
            writer.write(b"data: [DONE]\n\n")
            await writer.drain()
            writer.close()
        return times

    pipe.send(uvloop.run(run()))


@dataclass
class Stream(asyncio.Protocol):
    """One client: sends a request and notes when each token's bytes were read."""

    request: bytes
    done: asyncio.Future[None]
    name: str = ""
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    _kept: bytes = b""

    def connection_made(self, transport: Any) -> None:
        """Ask."""
        self._transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Every event that is whole now was read now."""
        now = time.perf_counter()
        data = self._kept + data
        cut = data.rfind(b"\n\n") + 2
        if cut < 2:
            self._kept = data
            return
        self._kept, whole = data[cut:], data[:cut]
        if not self.name and (found := _ID.search(whole)):
            self.name = found[1].decode()
        for token in _EVENT.findall(whole):
            self.tokens.append(int(token))
            self.times.append(now)
        if b"data: [DONE]" in whole and not self.done.done():
            self.done.set_result(None)
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        """A stream that breaks off early is a failure."""
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the stream ended early"))


def request_for(num_tokens: int) -> bytes:
    """What a client writes."""
    body = json.dumps(
        {"prompt": list(range(PROMPT)), "max_tokens": num_tokens, "stream": True, "return_token_ids": True}
    ).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%s" % (len(body), body)
    )


async def read_streams(port: int, lengths: list[int]) -> list[Stream]:
    """All streams at once, to their ends."""
    loop = asyncio.get_running_loop()
    streams = [Stream(request_for(length), loop.create_future()) for length in lengths]
    for stream in streams:
        await loop.create_connection(partial(lambda one: one, stream), "127.0.0.1", port)
    await asyncio.gather(*(stream.done for stream in streams))
    return streams


def measure(target: Callable[..., None], arguments: tuple[Any, ...], lengths: list[int]) -> np.ndarray:
    """Seconds from each token's being there to its having been read; checks that all came, each once, in order."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(*arguments, theirs))
    process.start()
    port = ours.recv()
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    streams = uvloop.run(read_streams(port, lengths))
    if target is serve:
        process.terminate()  # The other ends by itself.
    made: dict[str, list[float]] = ours.recv()
    process.join()
    overheads = []
    for stream, length in zip(streams, lengths, strict=True):
        if stream.tokens != list(range(length)):
            raise SystemExit(f"error: stream {stream.name} got tokens {stream.tokens}, not 0 to {length - 1}")
        overheads += [read - there for read, there in zip(stream.times, made[stream.name], strict=True)]
    return np.array(overheads)


def main() -> None:
    """Print both distributions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument(
        "--tokens", type=int, default=16, help="of a stream, in the mean: drawn from half to thrice that half"
    )
    parser.add_argument("--policy", nargs="+", default=["fastserve", "fastserve-fcfs"])
    arguments = parser.parse_args()
    num_streams, num_tokens = arguments.streams, arguments.tokens
    drawn = np.random.default_rng(0).integers(num_tokens // 2, num_tokens * 3 // 2, num_streams, endpoint=True).tolist()
    runs: dict[str, tuple[Callable[..., None], tuple[Any, ...], list[int]]] = {
        policy: (serve, (policy,), drawn) for policy in arguments.policy
    }
    rounds = num_streams * num_tokens // BATCH
    runs["bare"] = (write_bare, (num_streams, rounds), [num_tokens] * num_streams)
    print(f"{num_streams} streams at {TOKENS_PER_S:.0f} tokens/s")
    for name, run in runs.items():
        overheads = 1e3 * measure(*run)
        p50, p90, p99 = np.percentile(overheads, (50, 90, 99))
        print(
            f"{name:16} all {overheads.size} tokens came once, in order; "
            f"median {p50:.2f} ms, P90 {p90:.2f}, P99 {p99:.2f}, largest {overheads.max():.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

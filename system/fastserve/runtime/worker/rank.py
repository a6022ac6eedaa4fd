"""Rank: a process that holds one part of the model, and computes and copies as the engine says.

One thread computes, and waits for other ranks inside that. Between iterations it serves the control channel; while it
computes, a second thread serves the channel every millisecond: it starts copies, reports ended copies, and
reports progress. An iteration needs no switch of threads, which would cost more than the channel does.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed import Store

from fastserve.core.clock import WallClock
from fastserve.core.errors import ConfigError, FastServeError, RankError
from fastserve.runtime.models.source import model_digest, resolve_model
from fastserve.runtime.parallel.channel import Channel, ChannelClosed, Message
from fastserve.runtime.parallel.groups import Progress, Ranks, join, leave
from fastserve.runtime.parallel.timing import time_all_reduces, time_sends
from fastserve.runtime.worker.copier import BlockCopier, make_copier
from fastserve.runtime.worker.devices import find_device
from fastserve.runtime.worker.protocol import WORK, RankConfig, parse_copies, parse_run, tokens_frame, versions
from fastserve.runtime.worker.sizing import default_num_blocks, default_num_host_blocks
from fastserve.runtime.worker.worker import Worker

_TICK_S, _COPY_TICK_S, _IDLE_TICK_S = 1e-3, 200e-6, 20e-3
"""How often the second thread serves the channel: while computing, while copying, after a second without work."""
_STOP_S = 5.0
"""Most time from a stop message to the end of the process."""
_JOIN_TIMEOUT_S = 600.0
"""Most time to wait for the other ranks, in the rendezvous and in every exchange."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Which rank this process is, as torchrun sets it."""

    rank: int
    world_size: int
    local_rank: int
    token: str
    """The secret that the engine asks for; empty if it asks for none."""

    @classmethod
    def from_environment(cls) -> Identity:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and FASTSERVE_TOKEN; ConfigError if a number is missing."""
        try:
            rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"RANK, WORLD_SIZE and LOCAL_RANK must be set to numbers ({error}); torchrun sets them: "
                "torchrun --nnodes 2 --nproc-per-node 4 ... -m fastserve.worker --engine HOST:PORT"
            ) from None
        return cls(rank, world_size, local_rank, os.environ.get("FASTSERVE_TOKEN", ""))


class Rank:
    """The rank's side of the control channel. `serve` returns when the engine says stop.

    Args:
        channel: to the engine.
        identity: which rank this is.
        model: where this machine keeps the model; None: where the engine says.
        store: of the process group; None: torchrun's.
    """

    def __init__(self, channel: Channel, identity: Identity, model: str | None, store: Store | None) -> None:
        self._channel = channel
        self._identity = identity
        self._model = model
        self._store = store
        self._timeout_s = _JOIN_TIMEOUT_S
        self._channel_lock = threading.Lock()
        """Held by the thread that serves the channel."""
        self._messages: deque[Message] = deque()
        """Work for the computing thread."""
        self._stop_by = float("inf")
        """When the process ends after a stop message, even if it still waits for ranks that have ended."""
        self._worker: Worker | None = None
        self._ranks = Ranks()
        self._copier: BlockCopier | None = None
        self._progress = Progress()
        self._num_submitted = self._num_ended = 0
        self._last_busy = -float("inf")
        self._last_alive_sent = 0.0

    def serve(self) -> None:
        """Say hello, load the part of the model, and work until the engine says stop.

        Reports an error to the engine before raising it. If the connection to the engine ends, so does the process.
        """
        threading.Thread(target=self._serve_channel_while_computing, name="control", daemon=True).start()
        identity = self._identity
        self._channel.send(
            "hello",
            rank=identity.rank,
            world_size=identity.world_size,
            local_rank=identity.local_rank,
            token=identity.token,
            host=socket.gethostname(),
            pid=os.getpid(),
            versions=versions(),
        )
        try:
            self._load()
            self._work()
        except Exception as error:
            self._report_failure(error)
            if waiting_for := self._progress.waiting_for:
                raise RankError(f"rank {identity.rank} has lost {waiting_for}: {error}") from None
            raise
        finally:
            if self._copier is not None:
                self._copier.close()
        self._worker = self._copier = None  # NCCL closes only after the CUDA graphs that use it are freed.
        leave()

    def _report_failure(self, error: Exception) -> None:
        what = str(error) if isinstance(error, FastServeError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(ChannelClosed):
            self._channel.send("failed", error=what, waiting_for=self._progress.waiting_for)

    # -- the computing thread ------------------------------------------------------------------------------------

    def _load(self) -> None:
        message = self._next_message()
        if message is None:
            return
        config = RankConfig.from_fields(message.fields)
        source, engine = config.source, config.engine
        self._timeout_s = config.timeout_s
        if config.torch_threads is not None:
            torch.set_num_threads(config.torch_threads)
        model, directory = resolve_model(self._model or source.model, source.load_format)
        place = config.parallel.place(self._identity.rank, model)
        own = source.device if source.device == "cpu" else f"{source.device}:{self._identity.local_rank}"
        device = str(find_device(own))
        # A pipeline has as many batches in flight as stages, so it needs room for as many.
        in_flight = replace(engine, max_batch_size=engine.max_batch_size * place.num_stages)
        sharing: Any = {"place": place, "sharers": config.ranks_on_host}
        gpu_blocks = default_num_blocks(model, in_flight, device, source.dtype, **sharing)
        host_blocks = default_num_host_blocks(model, gpu_blocks, engine.block_size, device, source.dtype, **sharing)
        self._channel.send(
            "configured", digest=model_digest(model, directory), gpu_blocks=gpu_blocks, host_blocks=host_blocks
        )
        message = self._next_message()
        if message is None:
            return
        ranks = join(place, self._identity.world_size, torch.device(device), self._store, _JOIN_TIMEOUT_S)
        self._ranks, self._progress = ranks, ranks.progress
        worker = Worker(
            model,
            num_gpu_blocks=message.fields["gpu_blocks"],
            num_host_blocks=message.fields["host_blocks"],
            block_size=engine.block_size,
            device=device,
            dtype=source.dtype,
            seed=source.seed,
            model_dir=directory,
            max_batch_size=engine.max_batch_size,
            max_model_len=engine.max_model_len,
            place=place,
            ranks=ranks,
        )
        for layer in worker.model.layers:  # Every layer counts as progress: a long iteration is no hang.
            layer.register_forward_pre_hook(self._count_progress)
        self._copier = make_copier(worker.gpu_cache, worker.host_cache, WallClock())
        self._worker = worker
        self._channel.send("ready")

    def _work(self) -> None:
        worker = self._worker
        if worker is None:
            return
        place = worker.place
        tells_tokens = place.is_last_stage and place.shard == 0
        tells_free = place.is_first_stage and place.shard == 0 and not tells_tokens
        while (message := self._next_message()) is not None:
            if message.kind != "run":
                self._measure(message, worker)
                continue
            index, sequences, sampling, extras = parse_run(message)
            computed = worker.launch(sequences, sampling, extras)()
            self._num_ended += 1
            if tells_tokens:
                self._channel.send_frame(tokens_frame(index, computed))
            elif tells_free:
                self._channel.send("free", (index,))

    def _measure(self, message: Message, worker: Worker) -> None:
        """Time an iteration of this stage alone, or messages between ranks; the first shard answers."""
        ranks, place = self._ranks, worker.place
        if message.kind == "probe":
            _, sequences, sampling, _ = parse_run(message)
            with ranks.disconnected():
                start = time.perf_counter()
                worker.launch(sequences, sampling)()
                seconds = [time.perf_counter() - start]
        else:
            sizes, repeats, like = message.numbers, message.fields["repeats"], worker.gpu_cache
            if message.fields["what"] == "all_reduce":
                seconds = time_all_reduces(ranks, sizes, like, repeats)
            else:
                seconds = time_sends(place, ranks, sizes, like, repeats)
        self._num_ended += 1
        if place.shard == 0:
            answer = "probed" if message.kind == "probe" else "exchanged"
            self._channel.send(answer, (place.stage, *(int(each * 1e9) for each in seconds)))

    def _count_progress(self, *_: object) -> None:
        self._progress.count += 1

    def _next_message(self) -> Message | None:
        """Wait for the next work; None once the engine has said stop."""
        while not self._messages and self._stop_by == float("inf"):
            with self._channel_lock:
                if not self._messages:
                    self._serve_channel(_COPY_TICK_S if self._is_copying else self._timeout_s / 8)
        return self._messages.popleft() if self._messages else None

    # -- either thread, with the channel lock held ---------------------------------------------------------------

    def _serve_channel(self, wait_s: float) -> None:
        """Read messages, after waiting for up to `wait_s` seconds; report ended copies and progress."""
        try:
            if select.select([self._channel], [], [], wait_s)[0]:
                for message in self._channel.receive():
                    self._dispatch(message)
            if self._is_copying:
                self._report_copies()
            self._send_alive()
        except ChannelClosed as error:
            self._end(f"the connection to the engine has ended ({error})")

    @property
    def _is_copying(self) -> bool:
        return self._copier is not None and self._copier.num_in_flight > 0

    def _dispatch(self, message: Message) -> None:
        """Act on a message, or queue it for the computing thread."""
        if message.kind == "copy":
            self._start_copies(message)
        elif message.kind == "stop":
            self._stop_by = time.monotonic() + _STOP_S
        else:
            self._num_submitted += message.kind in WORK
            self._messages.append(message)

    def _start_copies(self, message: Message) -> None:
        worker, copier = self._worker, self._copier
        assert worker is not None
        assert copier is not None
        if worker.device.type == "cuda":
            torch.cuda.set_device(worker.device)  # Per thread.
        for index, direction, source, destination in parse_copies(message):
            copier.start(direction, source, destination, index)

    def _report_copies(self) -> None:
        assert self._copier is not None
        for copy in self._copier.finished():
            self._progress.count += 1
            self._channel.send("copied", (copy.tag, int((copy.end_s - copy.start_s) * 1e9)))

    def _send_alive(self) -> None:
        """Report progress while there is work and for a while after: the engine may still wait for other ranks."""
        now = time.monotonic()
        busy = self._num_submitted != self._num_ended or self._is_copying
        if busy:
            self._last_busy = now
        if now - self._last_busy < 2 * self._timeout_s and now - self._last_alive_sent > self._timeout_s / 8:
            self._last_alive_sent = now
            self._channel.send("alive", (busy, self._progress.count), waiting_for=self._progress.waiting_for)

    # -- the second thread ---------------------------------------------------------------------------------------

    def _serve_channel_while_computing(self) -> None:
        try:
            while time.monotonic() < self._stop_by:
                idle = time.monotonic() - self._last_busy > 1.0
                time.sleep(_COPY_TICK_S if self._is_copying else _IDLE_TICK_S if idle else _TICK_S)
                if self._channel_lock.acquire(blocking=False):
                    try:
                        self._serve_channel(0.0)
                    finally:
                        self._channel_lock.release()
        except Exception as error:
            traceback.print_exc()
            self._report_failure(error)
            self._end(f"{type(error).__name__}: {error}")
        os._exit(0)

    def _end(self, why: str) -> None:
        """End the process at once, whatever the other thread does."""
        if self._store is None:  # Otherwise the engine that started it reports the error.
            print(f"error: rank {self._identity.rank}: {why}", file=sys.stderr, flush=True)
        os._exit(1)

"""One rank of an engine on several: a process that computes and copies as the engine says, with its part of the model.

One thread computes, and waits within for other ranks. Between iterations it attends to the control channel; while it
computes, another thread does so every millisecond: it starts copies, reports those that have ended, and says that the
process is alive and how far it is. An iteration needs no change of threads, which costs more than the channel does.
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
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed import Store, TCPStore

from fastserve.core.clock import WallClock
from fastserve.core.config import EngineOptions
from fastserve.core.errors import ConfigError, FastServeError, RankError
from fastserve.runtime.models.source import model_digest, resolve_model
from fastserve.runtime.parallel.channel import Channel, ChannelClosed, Message, parse_address
from fastserve.runtime.parallel.groups import Progress, Ranks, join, leave
from fastserve.runtime.parallel.timing import time_all_reduces, time_sends
from fastserve.runtime.worker.copier import BlockCopier, make_copier
from fastserve.runtime.worker.devices import find_device
from fastserve.runtime.worker.protocol import WORK, RankConfig, parse_copies, parse_run, tokens_frame, versions
from fastserve.runtime.worker.sizing import default_num_blocks, default_num_host_blocks
from fastserve.runtime.worker.worker import Worker

_TICK_S, _COPY_TICK_S, _IDLE_TICK_S = 1e-3, 200e-6, 20e-3
"""How often the channel is attended to while the process computes, copies, or has done nothing for a second."""
_STOP_S = 5.0
"""Most time between being told to stop and having stopped."""
_JOIN_TIMEOUT_S = 600.0
_CONNECT_S = 60.0
_SILENCE_S = 8.0


@dataclass(frozen=True, slots=True)
class Identity:
    """Which rank this is, as torchrun says it."""

    rank: int
    world_size: int
    local_rank: int
    token: str
    """A secret that the engine asks for, or nothing."""

    @classmethod
    def from_environment(cls) -> Identity:
        """Of RANK, WORLD_SIZE and LOCAL_RANK, and FASTSERVE_TOKEN; ConfigError if they are not set."""
        try:
            rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"RANK, WORLD_SIZE and LOCAL_RANK must be set to numbers ({error}); torchrun sets them: "
                "torchrun --nnodes 2 --nproc-per-node 4 ... -m fastserve.worker --engine HOST:PORT"
            ) from None
        return cls(rank, world_size, local_rank, os.environ.get("FASTSERVE_TOKEN", ""))


class Rank:
    """The process's side of the control channel. `serve` returns when the engine says stop.

    Args:
        channel: to the engine.
        identity: which rank this is.
        model: where this machine keeps the model, if elsewhere than the engine says.
        store: of the process group; None: torchrun's.
    """

    def __init__(self, channel: Channel, identity: Identity, model: str | None, store: Store | None) -> None:
        self._channel = channel
        self._identity = identity
        self._model = model
        self._store = store
        self._timeout_s = _JOIN_TIMEOUT_S
        self._ear = threading.Lock()
        """Held by the thread that attends to the channel."""
        self._messages: deque[Message] = deque()
        """For the thread that computes."""
        self._stop_by = float("inf")
        """When the process ends, having been told to stop; others it waits for may be gone already."""
        self._worker: Worker | None = None
        self._ranks = Ranks()
        self._copier: BlockCopier | None = None
        self._progress = Progress()
        self._num_submitted = self._num_ended = 0
        self._last_busy = -float("inf")
        self._last_said = 0.0

    def serve(self) -> None:
        """Say hello, load what the engine says, and work until it says stop.

        Raises what went wrong, after it has been reported; if the engine goes away, the process ends at once.
        """
        threading.Thread(target=self._attend_while_computing, name="control", daemon=True).start()
        who = self._identity
        self._channel.send(
            "hello",
            rank=who.rank,
            world_size=who.world_size,
            local_rank=who.local_rank,
            token=who.token,
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
                raise RankError(f"rank {who.rank} has lost {waiting_for}: {error}") from None
            raise
        finally:
            if self._copier is not None:
                self._copier.close()
        self._worker = self._copier = None  # NCCL parts only once the graphs that use it have gone.
        leave()

    def _report_failure(self, error: Exception) -> None:
        what = str(error) if isinstance(error, FastServeError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(ChannelClosed):
            self._channel.send("failed", error=what, waiting_for=self._progress.waiting_for)

    # -- the thread that computes --------------------------------------------------------------------------------

    def _load(self) -> None:
        message = self._next_message()
        if message is None:
            return
        fields = message.fields
        fields["stage_layers"] = fields["stage_layers"] and tuple(fields["stage_layers"])
        config = RankConfig(**fields)
        self._timeout_s = config.timeout_s
        if config.torch_threads is not None:
            torch.set_num_threads(config.torch_threads)
        model, directory = resolve_model(self._model or config.model, config.load_format)
        place = config.parallel.place(self._identity.rank, model)
        own = config.device if config.device == "cpu" else f"{config.device}:{self._identity.local_rank}"
        device = str(find_device(own))
        # A pipeline has as many batches in flight as stages, so wants room for as many.
        options = EngineOptions(
            config.max_batch_size * place.num_stages,
            config.token_budget,
            config.block_size,
            max_model_len=config.max_model_len,
        )
        gpu_blocks = default_num_blocks(model, options, device, config.dtype, place=place, sharers=config.ranks_on_host)
        host_blocks = default_num_host_blocks(
            model, gpu_blocks, config.block_size, device, config.dtype, place=place, sharers=config.ranks_on_host
        )
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
            block_size=config.block_size,
            device=device,
            dtype=config.dtype,
            seed=config.seed,
            model_dir=directory,
            max_batch_size=config.max_batch_size,
            max_model_len=config.max_model_len,
            place=place,
            ranks=ranks,
        )
        for layer in worker.model.layers:  # However long an iteration takes, it can be seen to move on.
            layer.register_forward_pre_hook(self._tick)
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
        """Time an iteration of this stage by itself, or messages between ranks; the first shard tells."""
        ranks, place = self._ranks, worker.place
        if message.kind == "probe":
            _, sequences, sampling, _ = parse_run(message)
            with _disconnected(ranks):
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

    def _tick(self, *_: object) -> None:
        self._progress.count += 1

    def _next_message(self) -> Message | None:
        """What is to be done next; None if nothing ever."""
        while not self._messages and self._stop_by == float("inf"):
            with self._ear:
                if not self._messages:
                    self._attend(_COPY_TICK_S if self._is_copying else self._timeout_s / 8)
        return self._messages.popleft() if self._messages else None

    # -- either thread, with the ear -----------------------------------------------------------------------------

    def _attend(self, wait_s: float) -> None:
        """Hear what the engine says, after waiting at most so long for it, and tell what there is to tell."""
        try:
            if select.select([self._channel], [], [], wait_s)[0]:
                for message in self._channel.receive():
                    self._take(message)
            if self._is_copying:
                self._report_copies()
            self._say_alive()
        except ChannelClosed as error:
            self._end(f"the engine has gone ({error})")

    @property
    def _is_copying(self) -> bool:
        return self._copier is not None and self._copier.num_in_flight > 0

    def _take(self, message: Message) -> None:
        """Act on a message, or keep it for the thread that computes."""
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
            torch.cuda.set_device(worker.device)  # Of this thread.
        for index, direction, source, destination in parse_copies(message):
            copier.start(direction, source, destination, index)

    def _report_copies(self) -> None:
        assert self._copier is not None
        for copy in self._copier.finished():
            self._progress.count += 1
            self._channel.send("copied", (copy.tag, int((copy.end_s - copy.start_s) * 1e9)))

    def _say_alive(self) -> None:
        """While there is work, and for a while after: the engine may be waiting for others, and listens."""
        now = time.monotonic()
        busy = self._num_submitted != self._num_ended or self._is_copying
        if busy:
            self._last_busy = now
        if now - self._last_busy < 2 * self._timeout_s and now - self._last_said > self._timeout_s / 8:
            self._last_said = now
            self._channel.send("alive", (busy, self._progress.count), waiting_for=self._progress.waiting_for)

    # -- the other thread ----------------------------------------------------------------------------------------

    def _attend_while_computing(self) -> None:
        try:
            while time.monotonic() < self._stop_by:
                idle = time.monotonic() - self._last_busy > 1.0
                time.sleep(_COPY_TICK_S if self._is_copying else _IDLE_TICK_S if idle else _TICK_S)
                if self._ear.acquire(blocking=False):
                    try:
                        self._attend(0.0)
                    finally:
                        self._ear.release()
        except Exception as error:
            traceback.print_exc()
            self._report_failure(error)
            self._end(f"{type(error).__name__}: {error}")
        os._exit(0)

    def _end(self, why: str) -> None:
        """End the process at once, whatever the other thread does."""
        if self._store is None:  # Else the engine that started it has said what there is to say.
            print(f"error: rank {self._identity.rank}: {why}", file=sys.stderr, flush=True)
        os._exit(1)


@contextlib.contextmanager
def _disconnected(ranks: Ranks) -> Iterator[None]:
    """Within, no activations go from stage to stage."""
    neighbours = ranks.neighbours
    if neighbours is None:
        yield
        return
    neighbours.connected = False
    try:
        yield
    finally:
        neighbours.connected = True


def run_rank(engine: str, store: str | None, model: str | None) -> None:
    """Connect to the engine at `engine` and serve it; `store` is the address of the process group's, if not torchrun's.

    Raises ConfigError if there is no engine, and what goes wrong while serving.
    """
    identity = Identity.from_environment()
    host, port = parse_address(engine, "--engine")
    channel = Channel(_connect(host, port), _SILENCE_S)
    group_store = None
    if store is not None:
        store_host, store_port = parse_address(store, "--store")
        group_store = TCPStore(store_host, store_port, is_master=False)
    try:
        Rank(channel, identity, model, group_store).serve()
    except FastServeError:
        if store is None:
            raise
        sys.exit(1)  # The engine that started it has been told, and says so.


def _connect(host: str, port: int) -> socket.socket:
    """The engine may be started after its ranks."""
    deadline = time.monotonic() + _CONNECT_S
    while True:
        try:
            return socket.create_connection((host, port), timeout=5.0)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"no engine at {host}:{port} within {_CONNECT_S:.0f} s ({error}); start it, or correct --engine"
                ) from None
            time.sleep(0.5)

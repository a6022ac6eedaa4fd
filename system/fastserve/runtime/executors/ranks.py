"""RankGroup: the ranks of a distributed engine as the engine sees them. Starts them, talks to them, watches them."""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import TCPStore

import fastserve
from fastserve.core.config import CacheConfig, ModelConfig
from fastserve.core.errors import ConfigError, RankError
from fastserve.core.processes import Leash
from fastserve.core.request import Request
from fastserve.kvcache import Direction, Transfer
from fastserve.runtime.models import SequenceInput
from fastserve.runtime.models.source import model_digest, resolve_model
from fastserve.runtime.parallel.channel import Channel, ChannelClosed, Message, frame, parse_address
from fastserve.runtime.worker.extras import Extras
from fastserve.runtime.worker.protocol import RankConfig, copy_frame, run_frame, versions
from fastserve.runtime.worker.runner import require_runner
from fastserve.runtime.worker.sampler import SamplingLike

_BLAME_S = 2.0
"""After a rank reports that another is lost to it: time for the other's end to be seen."""
_STOP_S = 5.0
"""Time ranks have to end on their own before they are killed."""
_HELLO_S = 10.0


@dataclass(eq=False)
class _Peer:
    """A rank, and what was last heard of it."""

    rank: int
    channel: Channel
    hello: dict[str, Any]
    what: str = ""
    """Its place in the model."""
    last_heard: float = 0.0
    last_progress: float = 0.0
    count: int = -1
    busy: bool = False
    waiting_for: str = ""
    failure: Message | None = None
    gone: str = ""
    """Why there is no connection any more; empty while there is one."""

    def __str__(self) -> str:
        place = f"{self.what}, " if self.what else ""
        return f"rank {self.rank} ({place}pid {self.hello['pid']} on {self.hello['host']})"

    @property
    def is_lost(self) -> bool:
        return bool(self.gone) or self.failure is not None


class RankGroup:
    """As many processes as the model is divided over, ready to compute.

    Args:
        config: what they are told.
        address: HOST:PORT at which to wait for ranks that torchrun starts; None: start them here.
        num_gpu_blocks: of every rank's pool on its device; None: as many as fit on the rank with the least room.
        num_host_blocks: of every rank's host pool; None: likewise.
        start_timeout_s: most time until all are ready.

    Raises:
        ConfigError: the model cannot be divided so, or ranks disagree about versions or the model. Nothing was loaded.
        RankError: a rank failed or did not come.
    """

    def __init__(
        self,
        config: RankConfig,
        *,
        address: str | None = None,
        num_gpu_blocks: int | None = None,
        num_host_blocks: int | None = None,
        start_timeout_s: float = 600.0,
    ) -> None:
        self.config = config
        self.world_size = config.parallel.world_size
        self.model_config, directory = resolve_model(config.model, config.load_format)
        places = [config.parallel.place(rank, self.model_config) for rank in range(self.world_size)]
        self._peers: list[_Peer] = []
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._leash: Leash | None = None
        self._selector = selectors.DefaultSelector()
        self._store: TCPStore | None = None
        self._error: RankError | None = None
        self.num_runs = 0
        """Iterations that the ranks were told to compute."""
        self._working_since: float | None = None
        self._last_polled = 0.0
        weakref.finalize(self, _kill, self._processes)
        try:
            deadline = time.monotonic() + start_timeout_s
            self._meet(address, deadline)
            for peer, place in zip(self._peers, places, strict=True):
                peer.what = str(place)
            self._require_equal("version", lambda peer: peer.hello["versions"], versions())
            hosts = Counter(peer.hello["host"] for peer in self._peers)
            for peer in self._peers:
                told = replace(config, ranks_on_host=hosts[peer.hello["host"]])
                self._tell(peer, "configure", **asdict(told))
            room = self._gather("configured", deadline)
            digest = model_digest(self.model_config, directory)
            self._require_equal("model", lambda peer: room[peer.rank].fields["digest"], digest)
            self.num_gpu_blocks = num_gpu_blocks or min(one.fields["gpu_blocks"] for one in room)
            least = min(one.fields["host_blocks"] for one in room)
            self.num_host_blocks = least if num_host_blocks is None else num_host_blocks
            for peer in self._peers:
                self._tell(peer, "load", gpu_blocks=self.num_gpu_blocks, host_blocks=self.num_host_blocks)
            self._gather("ready", deadline)
        except BaseException:
            self._abandon()
            raise

    def require(self, model_config: ModelConfig, cache: CacheConfig, device: str, dtype: str) -> None:
        """Raise ConfigError unless these ranks can serve an engine of that model, with a cache of that size."""
        own = (self.config.device, self.config.dtype)
        require_runner("group of ranks", self, own, model_config, cache, (device, dtype))

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.config.block_size

    def prepare(self, sequences: Sequence[SequenceInput]) -> None:
        """Do nothing: ranks prepare when they are told."""

    # -- work ----------------------------------------------------------------------------------------------------

    def run(
        self, sequences: Sequence[SequenceInput], sampling: Sequence[SamplingLike], extras: Extras | None = None
    ) -> int:
        """Have all ranks compute an iteration, as `Worker.launch` takes it; returns its number.

        What comes of it comes from `poll`: a message "free" when the first of several stages has ended it, and "tokens"
        when the last has.
        """
        index = self.num_runs
        self.num_runs += 1
        self._send(run_frame(index, sequences, sampling, extras))
        return index

    def copy(self, transfers: Iterable[tuple[int, Transfer]]) -> None:
        """Have all ranks copy their parts; each says "copied" when it has."""
        self._send(copy_frame(transfers))

    def idle(self) -> None:
        """Nothing is to be computed or copied any more: from now on the ranks need not be heard of."""
        self._working_since = None

    def poll(self, timeout_s: float) -> list[Message]:
        """What ranks say about work, after waiting at most so long for some of it.

        Raises RankError if one has died, failed, or neither works nor waits for another that does; the rest is stopped.
        """
        if self._error is not None:
            raise self._error
        now = time.monotonic()
        if now - self._last_polled > self.config.timeout_s / 2 and self._working_since is not None:
            self._working_since = now  # Nobody listened, so nobody was silent.
        messages = self._listen(min(timeout_s, self.config.timeout_s / 8))
        self._last_polled = time.monotonic()
        if any(peer.is_lost for peer in self._peers):
            self._blame()
        self._watch()
        return messages

    def execute(self, sequences: Sequence[SequenceInput], sampling: Sequence[SamplingLike]) -> list[int]:
        """`run` while nothing else runs, and wait for the tokens."""
        self.run(sequences, sampling)
        (tokens,) = self._await("tokens", 1)
        return tokens.numbers[1:]

    # -- measuring -----------------------------------------------------------------------------------------------

    def probe(self, sequences: Sequence[SequenceInput], sampling: Sequence[SamplingLike]) -> tuple[float, ...]:
        """Seconds that each stage takes for its part of an iteration, all of them at the same time, with all-reduces
        and without sends: as in a full pipeline, where stages share cores and memory. While nothing else runs."""
        answers = self._ask(run_frame(0, sequences, sampling, kind="probe"), "probed")
        return tuple(numbers[0] * 1e-9 for numbers in answers)

    def all_reduce_times(self, sizes: Sequence[int], repeats: int = 15) -> list[tuple[int, float]]:
        """Bytes and median seconds of all-reduces, the mean over stages; while nothing else runs."""
        return self._exchange_times("all_reduce", sizes, repeats)

    def send_times(self, sizes: Sequence[int], repeats: int = 15) -> list[tuple[int, float]]:
        """Bytes and mean seconds in which a stage receives what the one before has sent while that computes on (the
        mean over stages); likewise."""
        return self._exchange_times("send", sizes, repeats)

    def copy_time(self, direction: Direction, blocks: Sequence[int]) -> float:
        """Seconds until every rank has copied its part of these blocks between its pools; likewise."""
        transfer = Transfer(Request("", 0.0, 1, []), direction, tuple(blocks), tuple(blocks), 0)
        start = time.perf_counter()
        self.copy([(0, transfer)])
        self._await("copied", self.world_size)
        return time.perf_counter() - start

    def _exchange_times(self, what: str, sizes: Sequence[int], repeats: int) -> list[tuple[int, float]]:
        answers = self._ask(frame("exchange", sizes, what=what, repeats=repeats), "exchanged")
        seconds = [statistics.mean(times) * 1e-9 for times in zip(*filter(None, answers), strict=True)]
        return list(zip(sizes, seconds, strict=True))

    def _ask(self, data: bytes, kind: str) -> list[list[int]]:
        """Have all work on it; what each stage answers, from the first."""
        self._send(data)
        answers = self._await(kind, self.config.pipeline_parallel_size)
        return [numbers for _, *numbers in sorted(message.numbers for message in answers)]

    def _await(self, kind: str, count: int) -> list[Message]:
        """So many messages of that kind, which end all work there is."""
        found: list[Message] = []
        while len(found) < count:
            found += [message for message in self.poll(self.config.timeout_s) if message.kind == kind]
        self.idle()
        return found

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within, ranks that were started here stand still, whatever they do: they take no processor."""
        for process in self._processes.values():
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in self._processes.values():
                process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Have the ranks end; those started here that do not are killed."""
        for peer in self._peers:
            if not peer.is_lost:
                with suppress(ChannelClosed):
                    peer.channel.send("stop")
        self._abandon(_STOP_S)

    # -- meeting -------------------------------------------------------------------------------------------------

    def _meet(self, address: str | None, deadline: float) -> None:
        """Wait until every rank has said hello."""
        host, port = ("127.0.0.1", 0) if address is None else parse_address(address, "ranks")
        token = secrets.token_hex(16) if address is None else os.environ.get("FASTSERVE_TOKEN", "")
        try:
            listener = socket.create_server((host, port), backlog=self.world_size)
        except OSError as error:
            raise ConfigError(f"cannot wait for ranks at {host}:{port}: {error.strerror}; choose another") from None
        with listener:
            if address is None:
                self._start(listener.getsockname()[1], token)
            else:
                print(f"waiting for {self.world_size} ranks at {host}:{port}", file=sys.stderr, flush=True)
            found: set[int] = set()
            while len(found) < self.world_size:
                self._require_running(found)
                if time.monotonic() > deadline:
                    missing = [rank for rank in range(self.world_size) if rank not in found]
                    raise RankError(
                        f"rank {missing[0]} did not come in time ({len(missing)} of {self.world_size} did not)"
                    )
                listener.settimeout(0.2)
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                peer = self._greet(connection, token)
                if peer is None:
                    continue
                self._peers.append(peer)
                known = range(self.world_size)
                if peer.hello["world_size"] != self.world_size or peer.rank in found or peer.rank not in known:
                    raise ConfigError(
                        f"{peer} of {peer.hello['world_size']} came, but this engine has {self.world_size} ranks "
                        f"({self.config.tensor_parallel_size} shards x {self.config.pipeline_parallel_size} stages), "
                        "each once; start as many"
                    )
                found.add(peer.rank)
        self._peers.sort(key=lambda peer: peer.rank)
        for peer in self._peers:
            self._selector.register(peer.channel, selectors.EVENT_READ, peer)

    def _start(self, port: int, token: str) -> None:
        """Start the ranks as processes of this machine, as torchrun would."""
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._leash = Leash()  # A rank that is frozen when this process is killed does not see its channel close.
        package = str(Path(fastserve.__file__).parents[1])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        for rank in range(self.world_size):
            environment = {
                "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "",
                **os.environ,
                "PYTHONPATH": path,
                "RANK": str(rank),
                "WORLD_SIZE": str(self.world_size),
                "LOCAL_RANK": str(rank),
                "FASTSERVE_TOKEN": token,
            }
            if self.config.torch_threads is not None:
                environment["OMP_NUM_THREADS"] = str(self.config.torch_threads)
            command = [sys.executable, "-m", "fastserve.worker", "--engine", f"127.0.0.1:{port}"]
            command += ["--store", f"127.0.0.1:{self._store.port}"]
            # In a session of its own: Ctrl-C is the engine's to handle.
            self._processes[rank] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
            )
            self._leash.hold(self._processes[rank].pid)

    def _greet(self, connection: socket.socket, token: str) -> _Peer | None:
        """The rank at the other end; None if that is none of ours."""
        channel = Channel(connection, self.config.timeout_s)
        deadline = time.monotonic() + _HELLO_S
        try:
            while time.monotonic() < deadline:
                for message in channel.receive():
                    if message.kind == "hello" and secrets.compare_digest(message.fields["token"], token):
                        return _Peer(int(message.fields["rank"]), channel, message.fields)
                    raise ChannelClosed("not a rank of this engine")
        except (ChannelClosed, KeyError, TypeError, ValueError):
            pass
        channel.close()
        return None

    def _require_running(self, found: set[int]) -> None:
        for rank, process in self._processes.items():
            if rank not in found and process.poll() is not None:
                raise RankError(f"rank {rank} {_ending(process.returncode)} before it could be reached; see its output")

    def _require_equal(self, what: str, of: Callable[[_Peer], Any], expected: Any) -> None:
        """Raise ConfigError unless all ranks have what the engine has."""
        for peer in self._peers:
            if (own := of(peer)) != expected:
                raise ConfigError(
                    f"{peer} has another {what} than the engine: {own} instead of {expected}; "
                    "every machine needs the same"
                )

    def _gather(self, kind: str, deadline: float) -> list[Message]:
        """The answer of that kind of every rank, by rank."""
        answers: dict[int, Message] = {}
        blame_at = float("inf")
        while len(answers) < self.world_size:
            for key, _ in self._selector.select(0.2):
                for message in self._receive(key.data):
                    if message.kind == kind:
                        answers[key.data.rank] = message
            lost = {peer.rank for peer in self._peers if peer.is_lost}
            if lost:  # Most fail alike: whichever is heard of first, the first of them is named.
                blame_at = min(blame_at, time.monotonic() + _BLAME_S)
                if len(lost | answers.keys()) == self.world_size or time.monotonic() > blame_at:
                    self._blame()
            if time.monotonic() > deadline:
                late = [peer for peer in self._peers if peer.rank not in answers]
                raise RankError(f"{late[0]} is not {kind} in time; {len(late)} of {self.world_size} ranks are not")
        return [answers[rank] for rank in range(self.world_size)]

    # -- talking and watching ------------------------------------------------------------------------------------

    def _tell(self, peer: _Peer, kind: str, **fields: Any) -> None:
        try:
            peer.channel.send(kind, **fields)
        except ChannelClosed as error:
            peer.gone = str(error)
            self._blame()

    def _send(self, data: bytes) -> None:
        """Send work to all."""
        if self._error is not None:
            raise self._error
        if self._working_since is None:
            self._working_since = time.monotonic()
            for peer in self._peers:
                peer.busy = False
        for peer in self._peers:
            try:
                peer.channel.send_frame(data)
            except ChannelClosed as error:
                peer.gone = str(error)
        if any(peer.is_lost for peer in self._peers):
            self._blame()

    def _listen(self, timeout_s: float) -> list[Message]:
        messages = []
        for key, _ in self._selector.select(timeout_s):
            messages += [message for message in self._receive(key.data) if message.kind != "alive"]
        return messages

    def _receive(self, peer: _Peer) -> list[Message]:
        """What the rank has sent, having noted what that says of its health."""
        try:
            messages = peer.channel.receive()
        except ChannelClosed as error:
            peer.gone = str(error)
            self._selector.unregister(peer.channel)
            return []
        now = peer.last_heard = time.monotonic()
        for message in messages:
            if message.kind == "failed":
                peer.failure = message
            elif message.kind == "alive":
                busy, count = message.numbers
                if not busy or not peer.busy or count != peer.count:
                    peer.last_progress = now
                peer.busy, peer.count, peer.waiting_for = bool(busy), count, message.fields["waiting_for"]
            else:
                peer.last_progress = now
        return messages

    def _watch(self) -> None:
        """Raise RankError if a rank that should work is silent or stands still."""
        if self._working_since is None:
            return
        now, timeout_s = time.monotonic(), self.config.timeout_s
        since = self._working_since
        if now - since < timeout_s:
            return
        overdue = [peer for peer in self._peers if now - max(peer.last_heard, since) > timeout_s]
        busy = [peer for peer in self._peers if peer.busy]
        still = [peer for peer in busy if now - max(peer.last_progress, since) > timeout_s]
        if not overdue and not still:
            return
        if overdue:
            self._end(
                overdue, f"has not been heard of for {timeout_s:g} s", "it hangs, or its machine cannot be reached"
            )
        stuck = [peer for peer in still if not peer.waiting_for]
        if stuck:
            self._end(stuck, f"has computed nothing for {timeout_s:g} s", "it hangs")
        if len(still) == len(busy):
            self._end(still, f"has waited for {still[0].waiting_for} for {timeout_s:g} s", "nobody works")

    # -- ending --------------------------------------------------------------------------------------------------

    def _blame(self) -> None:
        """Some rank is lost. Find out which was the first, and raise RankError.

        One that waits for another fails when the other is gone, and may be heard of first.
        """
        deadline = time.monotonic() + _BLAME_S
        while not (guilty := [peer for peer in self._peers if peer.is_lost and not self._is_victim(peer)]):
            if time.monotonic() > deadline:
                guilty = [peer for peer in self._peers if peer.is_lost]
                break
            self._listen(0.05)
        peer = guilty[0]
        if peer.failure is not None:
            fields = peer.failure.fields
            while_waiting = f" while it waited for {fields['waiting_for']}" if fields["waiting_for"] else ""
            self._end([peer], f"failed{while_waiting}: {fields['error']}")
        process = self._processes.get(peer.rank)
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._end([peer], _ending(process.wait(1.0)))
        self._end([peer], f"is gone: {peer.gone}")

    @staticmethod
    def _is_victim(peer: _Peer) -> bool:
        return peer.failure is not None and bool(peer.failure.fields["waiting_for"])

    def _end(self, guilty: Sequence[_Peer], what: str, guess: str = "") -> NoReturn:
        """Stop all ranks and raise the error, now and whenever the group is asked for anything again."""
        others = f" (and so for rank {', '.join(str(peer.rank) for peer in guilty[1:])})" if guilty[1:] else ""
        reason = f": {guess}" if guess else ""
        self._error = RankError(f"{guilty[0]} {what}{others}{reason}; the engine has ended, start another")
        self._abandon()
        raise self._error

    def _abandon(self, grace_s: float = 0.0) -> None:
        """Hang up, which ends ranks anywhere, and see to it that those started here have ended."""
        deadline = time.monotonic() + grace_s
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for peer in self._peers:
            peer.channel.close()
        self._peers = []
        self._selector.close()
        _kill(self._processes)
        if self._leash is not None:
            self._leash.close()
        self._store = None


def _kill(processes: dict[int, subprocess.Popen[bytes]]) -> None:
    for process in processes.values():
        process.kill()
    for process in processes.values():
        process.wait()
    processes.clear()


def _ending(status: int) -> str:
    """How a process of that exit status ended."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"

"""RankGroup: start the ranks of a distributed engine, give them work and notice when one is lost."""

from __future__ import annotations

import selectors
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, replace
from typing import Any, NoReturn

from fastserve.core.config import CacheConfig, ModelConfig
from fastserve.core.errors import ConfigError, RankError
from fastserve.core.request import Request
from fastserve.kvcache import Direction, Transfer
from fastserve.runtime.executors.ranks.peer import Peer
from fastserve.runtime.executors.ranks.processes import LocalProcesses
from fastserve.runtime.executors.ranks.rendezvous import meet
from fastserve.runtime.executors.ranks.watch import Fault, find_hanging
from fastserve.runtime.models import SequenceInput
from fastserve.runtime.models.source import model_digest, resolve_model
from fastserve.runtime.parallel.channel import ChannelClosed, Message, frame
from fastserve.runtime.worker.extras import Extras
from fastserve.runtime.worker.protocol import RankConfig, copy_frame, run_frame, versions
from fastserve.runtime.worker.runner import require_runner
from fastserve.runtime.worker.sampler import SamplingLike

_CAUSE_S = 2.0
"""Time to wait for the cause after a rank has reported that it lost another."""
_STOP_S = 5.0
"""Time from a stop message until ranks of this machine are killed."""


class RankGroup:
    """All ranks of a model, each a process with its part loaded, ready to compute.

    Args:
        config: sent to every rank.
        address: HOST:PORT at which ranks of torchrun connect; None: start the ranks on this machine.
        start_timeout_s: most time until all ranks are ready.

    Raises:
        ConfigError: the model cannot be divided so, or a rank has other versions or another model than the engine;
            nothing was loaded.
        RankError: a rank failed or did not connect.
    """

    def __init__(
        self,
        config: RankConfig,
        *,
        address: str | None = None,
        start_timeout_s: float = 600.0,
    ) -> None:
        self.config = config
        self.world_size = config.parallel.world_size
        self.model_config, directory = resolve_model(config.source.model, config.source.load_format)
        places = [config.parallel.place(rank, self.model_config) for rank in range(self.world_size)]
        self._peers: list[Peer] = []
        self._processes = LocalProcesses()
        self._selector = selectors.DefaultSelector()
        self._error: RankError | None = None
        self.num_runs = 0
        """Iterations sent to the ranks."""
        self._working_since: float | None = None
        self._last_polled = 0.0
        try:
            deadline = time.monotonic() + start_timeout_s
            self._peers = meet(config, address, self._processes, deadline)
            for peer, place in zip(self._peers, places, strict=True):
                peer.place = str(place)
                self._selector.register(peer.channel, selectors.EVENT_READ, peer)
            self._require_equal("version", lambda peer: peer.hello["versions"], versions())
            hosts = Counter(peer.hello["host"] for peer in self._peers)
            for peer in self._peers:
                rank_config = replace(config, ranks_on_host=hosts[peer.hello["host"]])
                self._tell(peer, "configure", **asdict(rank_config))
            room = self._gather("configured", deadline)
            digest = model_digest(self.model_config, directory)
            self._require_equal("model", lambda peer: room[peer.rank].fields["digest"], digest)
            self.num_gpu_blocks = config.engine.num_gpu_blocks or min(message.fields["gpu_blocks"] for message in room)
            least = min(message.fields["host_blocks"] for message in room)
            part = config.parallel.rank_kv_bytes_per_token(self.model_config, config.source.dtype)
            wanted = config.engine.host_blocks(part)
            self.num_host_blocks = least if wanted is None else wanted
            for peer in self._peers:
                self._tell(peer, "load", gpu_blocks=self.num_gpu_blocks, host_blocks=self.num_host_blocks)
            self._gather("ready", deadline)
        except BaseException:
            self._abandon()
            raise

    def require(self, model_config: ModelConfig, cache: CacheConfig, device: str, dtype: str) -> None:
        """Raise ConfigError unless these ranks can serve an engine of that model, with a cache of that size."""
        own = (self.config.source.device, self.config.source.dtype)
        require_runner("group of ranks", self, own, model_config, cache, (device, dtype))

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.config.engine.block_size

    def prepare(self, sequences: Sequence[SequenceInput]) -> None:
        """Do nothing: ranks lay out a batch when they receive it."""

    # -- work ----------------------------------------------------------------------------------------------------

    def run(
        self, sequences: Sequence[SequenceInput], sampling: Sequence[SamplingLike], extras: Extras | None = None
    ) -> int:
        """Send all ranks an iteration, as `Worker.launch` takes it, to compute; returns its number.

        `poll` then returns a message "free" when the first of several stages has ended it, and "tokens" when the last
        stage has.
        """
        index = self.num_runs
        self.num_runs += 1
        self._send(run_frame(index, sequences, sampling, extras))
        return index

    def copy(self, transfers: Iterable[tuple[int, Transfer]]) -> None:
        """Send all ranks numbered transfers to copy their parts of; each answers "copied" when it has."""
        self._send(copy_frame(transfers))

    def idle(self) -> None:
        """Note that all work is done: ranks may be silent until the next `run` or `copy`."""
        self._working_since = None

    def poll(self, timeout_s: float) -> list[Message]:
        """Messages of the ranks about their work, after waiting for up to `timeout_s` seconds for the first.

        Raises RankError if a rank has died, failed or hangs; all ranks are then stopped.
        """
        if self._error is not None:
            raise self._error
        now = time.monotonic()
        if now - self._last_polled > self.config.timeout_s / 2 and self._working_since is not None:
            self._working_since = now  # Nothing was read meanwhile, so silence means nothing.
        messages = self._listen(min(timeout_s, self.config.timeout_s / 8))
        self._last_polled = time.monotonic()
        if any(peer.is_lost for peer in self._peers):
            self._raise_cause()
        if self._working_since is not None:
            fault = find_hanging(self._peers, time.monotonic(), self._working_since, self.config.timeout_s)
            if fault is not None:
                self._end(fault)
        return messages

    def execute(self, sequences: Sequence[SequenceInput], sampling: Sequence[SamplingLike]) -> list[int]:
        """Compute an iteration while nothing else runs; returns its tokens."""
        self.run(sequences, sampling)
        (tokens,) = self._await("tokens", 1)
        return tokens.numbers[1:]

    # -- measuring -----------------------------------------------------------------------------------------------

    def probe(self, sequences: Sequence[SequenceInput], sampling: Sequence[SamplingLike]) -> tuple[float, ...]:
        """Seconds that each stage takes for its part of an iteration. Call it while nothing else runs.

        All stages compute at the same time, with all-reduces and without sends: in a full pipeline, too, they share
        cores and memory.
        """
        answers = self._ask(run_frame(0, sequences, sampling, kind="probe"), "probed")
        return tuple(numbers[0] * 1e-9 for numbers in answers)

    def all_reduce_times(self, sizes: Sequence[int], repeats: int = 15) -> list[tuple[int, float]]:
        """Bytes and median seconds of all-reduces, the mean over stages. Call it while nothing else runs."""
        return self._exchange_times("all_reduce", sizes, repeats)

    def send_times(self, sizes: Sequence[int], repeats: int = 15) -> list[tuple[int, float]]:
        """Bytes and mean seconds in which a stage receives what the stage before has sent, the mean over stages.

        The sending stage keeps computing meanwhile. Call it while nothing else runs.
        """
        return self._exchange_times("send", sizes, repeats)

    def copy_time(self, direction: Direction, blocks: Sequence[int]) -> float:
        """Seconds until every rank has copied its part of these blocks. Call it while nothing else runs."""
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
        """Send the message to all ranks; returns the numbers that each stage answers with, by stage."""
        self._send(data)
        answers = self._await(kind, self.config.parallel.pipeline_parallel_size)
        return [numbers for _, *numbers in sorted(message.numbers for message in answers)]

    def _await(self, kind: str, count: int) -> list[Message]:
        """Wait for `count` messages of that kind, with which all work is done."""
        found: list[Message] = []
        while len(found) < count:
            found += [message for message in self.poll(self.config.timeout_s) if message.kind == kind]
        self.idle()
        return found

    def frozen(self) -> AbstractContextManager[None]:
        """Within, ranks that were started here stand still and take no CPU time."""
        return self._processes.frozen()

    def close(self) -> None:
        """Stop the ranks; kill ranks of this machine that do not end in time."""
        for peer in self._peers:
            if not peer.is_lost:
                with suppress(ChannelClosed):
                    peer.channel.send("stop")
        self._abandon(_STOP_S)

    def _require_equal(self, what: str, of: Callable[[Peer], Any], expected: Any) -> None:
        """Raise ConfigError unless `of` gives for every rank what the engine has."""
        for peer in self._peers:
            if (own := of(peer)) != expected:
                raise ConfigError(
                    f"{peer} has another {what} than the engine: {own} instead of {expected}; "
                    "every machine needs the same"
                )

    def _gather(self, kind: str, deadline: float) -> list[Message]:
        """Wait for a message of that kind from every rank; returns them by rank."""
        answers: dict[int, Message] = {}
        give_up_at = float("inf")
        while len(answers) < self.world_size:
            for key, _ in self._selector.select(0.2):
                for message in self._receive(key.data):
                    if message.kind == kind:
                        answers[key.data.rank] = message
            lost = {peer.rank for peer in self._peers if peer.is_lost}
            if lost:  # Ranks usually fail alike: wait for all, to name the first by rank.
                give_up_at = min(give_up_at, time.monotonic() + _CAUSE_S)
                if len(lost | answers.keys()) == self.world_size or time.monotonic() > give_up_at:
                    self._raise_cause()
            if time.monotonic() > deadline:
                late = [peer for peer in self._peers if peer.rank not in answers]
                raise RankError(f"{late[0]} is not {kind} in time; {len(late)} of {self.world_size} ranks are not")
        return [answers[rank] for rank in range(self.world_size)]

    # -- talking and watching ------------------------------------------------------------------------------------

    def _tell(self, peer: Peer, kind: str, **fields: Any) -> None:
        try:
            peer.channel.send(kind, **fields)
        except ChannelClosed as error:
            peer.gone = str(error)
            self._raise_cause()

    def _send(self, data: bytes) -> None:
        """Send work to all ranks."""
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
            self._raise_cause()

    def _listen(self, timeout_s: float) -> list[Message]:
        messages = []
        for key, _ in self._selector.select(timeout_s):
            messages += [message for message in self._receive(key.data) if message.kind != "alive"]
        return messages

    def _receive(self, peer: Peer) -> list[Message]:
        """Read what the rank has sent, and note what that says of its health."""
        try:
            messages = peer.channel.receive()
        except ChannelClosed as error:
            peer.gone = str(error)
            self._selector.unregister(peer.channel)
            return []
        peer.note(messages, time.monotonic())
        return messages

    # -- ending --------------------------------------------------------------------------------------------------

    def _raise_cause(self) -> NoReturn:
        """Some rank is lost: find out which was the first, and raise RankError.

        A rank that waits for a lost one fails too, and its report may arrive first.
        """
        deadline = time.monotonic() + _CAUSE_S
        while not (causes := [peer for peer in self._peers if peer.is_lost and not peer.failed_waiting]):
            if time.monotonic() > deadline:
                causes = [peer for peer in self._peers if peer.is_lost]
                break
            self._listen(0.05)
        peer = causes[0]
        if peer.failure is not None:
            fields = peer.failure.fields
            while_waiting = f" while it waited for {fields['waiting_for']}" if fields["waiting_for"] else ""
            self._end(Fault([peer], f"failed{while_waiting}: {fields['error']}"))
        self._end(Fault([peer], self._processes.ending(peer.rank) or f"is gone: {peer.gone}"))

    def _end(self, fault: Fault) -> NoReturn:
        """Stop all ranks and raise the error; every later call raises it again."""
        self._error = RankError(str(fault))
        self._abandon()
        raise self._error

    def _abandon(self, grace_s: float = 0.0) -> None:
        """Close the channels, which ends all ranks; kill ranks of this machine after `grace_s` seconds."""
        self._processes.wait(time.monotonic() + grace_s)
        for peer in self._peers:
            peer.channel.close()
        self._peers = []
        self._selector.close()
        self._processes.kill()

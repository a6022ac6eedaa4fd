"""A workload replayed over HTTP: each request is sent at its time, whatever became of those before it.

Nothing but the schedule decides when a request is sent, and latencies count from the schedule: a client, a connection
or a cap that holds a request back makes it slower, not later (no coordinated omission).
"""

from __future__ import annotations

import asyncio
import gc
import math
import resource
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import aiohttp
import numpy as np

from fastserve.core.checks import require_int
from fastserve.core.errors import ConfigError, ServerError
from fastserve.core.request import RequestStatus
from harness.client.answer import TOLERANCE, BrokenAnswer, Exchange
from harness.client.request import Wording
from harness.client.server import Server, counted_between, message_of, open_session, read_counters
from harness.client.sse import Event, EventParser
from harness.workload.traces.lengths import FloatArray
from harness.workload.workload import Workload

DEFAULT_VOCABULARY = 1000
"""Token ids below this are in any model's vocabulary."""
_WARMUP_PROMPT, _WARMUP_OUTPUT = 16, 8
_OTHER_FILES = 100
"""Open files that are not connections of a replay, at the most."""
_AFTER_DONE_S, _AFTER_FINISH_S = 1.0, 10.0
"""How long the end of an answer may follow its [DONE], or its finish_reason, which a usage may follow; beyond that the
answer has ended, and its connection is closed, not used again."""


@dataclass(frozen=True)
class ReplayOptions:
    """How a workload is replayed. ConfigError for what is out of range."""

    max_concurrency: int | None = None
    """Requests under way at a time; None: all that are due."""
    drain_limit_s: float = 600.0
    """How long after the last scheduled arrival requests may take; what is unfinished then is aborted."""
    warmup: int = 0
    """Short requests before the clock starts."""
    wording: Wording = field(default_factory=Wording)
    """What is sent, and where."""

    def __post_init__(self) -> None:
        if self.max_concurrency is not None:
            require_int("max_concurrency", self.max_concurrency, 1)
        require_int("warmup", self.warmup, 0)
        if not (math.isfinite(self.drain_limit_s) and self.drain_limit_s >= 0):
            raise ConfigError(f"drain_limit must be a finite number of seconds of at least 0, not {self.drain_limit_s}")


@dataclass(frozen=True)
class Replay:
    """What came of a workload."""

    server: Server
    exchanges: Sequence[Exchange]
    """In the order of their arrival."""
    counted: dict[str, int | None]
    """What the server counted meanwhile, by keys of summary.json."""
    wanted_connections: int
    max_connections: int
    """At a time: those wanted, or what the limit on open files allows."""
    run_id: str
    """The X-Request-ID of a request is this, a hyphen and its id."""
    ignore_eos: bool
    """Whether the server was asked for exactly as many tokens as the trace has."""
    stopped_by: signal.Signals | None
    """What ended the replay before its end; what was unfinished then is aborted."""

    @property
    def lateness_s(self) -> FloatArray:
        """How much later than due each request was sent, of those sent."""
        late = np.array([each.sent_s - each.due_s for each in self.exchanges])
        return late[np.isfinite(late)]

    @property
    def finished(self) -> list[Exchange]:
        """The requests that finished."""
        return [each for each in self.exchanges if each.outcome is RequestStatus.FINISHED]

    @property
    def num_of_other_length(self) -> int:
        """Finished requests with more or fewer tokens than were asked for."""
        return sum(each.output_tokens != each.max_tokens for each in self.finished)

    @property
    def warnings(self) -> Iterator[str]:
        """What makes the measurement other than it was meant to be."""
        num_kept_back = sum(each.due_s > each.arrival_s for each in self.exchanges)
        if num_kept_back and self.max_connections < self.wanted_connections:
            yield (
                f"{num_kept_back} requests waited for one of {self.max_connections} connections, all that the limit on "
                "open files leaves; raise it (ulimit -n), or say --max-concurrency"
            )
        if num_of_other_length := self.num_of_other_length:
            why = (
                "the server may not know ignore_eos, or bounds the length"
                if self.ignore_eos
                else "with --no-ignore-eos the model ends its outputs, so their lengths are not the trace's"
            )
            yield (
                f"{num_of_other_length} of {len(self.exchanges)} requests got another number of tokens than they "
                f"asked for: {why}"
            )
        yield from self._what_cannot_be_told()

    def _what_cannot_be_told(self) -> Iterator[str]:
        finished = self.finished
        several = [each for each in finished if each.output_tokens > 1]
        unstreamed = [each for each in finished if not each.is_streamed]
        if unstreamed:
            yield (
                f"{len(unstreamed)} of {len(finished)} finished requests got all their text at once: they have no time "
                "to first token, time per token or longest gap; the server does not stream, or a proxy keeps the "
                "stream back"
            )
        unsaid = [each for each in several if each.is_streamed and not each.adds_up]
        if unsaid:
            tokens, events = _tokens_and_events(unsaid)
            yield (
                f"{len(unsaid)} of {len(finished)} finished requests have {tokens} tokens in {events} events, and the "
                "server does not say how many came with which: they have no time per token and no longest gap"
            )
        tokens, events = _tokens_and_events([each for each in several if each.tells_time_per_token])
        if tokens > (1 + TOLERANCE) * events:
            yield f"{tokens} tokens came in {events} events: the longest gap is between events, not between tokens"
        uncounted = sum(not each.usage_tokens and not each.counts_are_said for each in finished)
        if uncounted:
            yield (
                f"the server gave no usage for {uncounted} of {len(finished)} finished requests: each event with text "
                "was taken for one token"
            )

    @property
    def meta(self) -> dict[str, Any]:
        """Keys of meta.json: what was measured and how."""
        finished = self.finished
        return {
            "server": {"version": self.server.version, "model": dict(self.server.card)},
            "client": {
                "max_connections": self.max_connections,
                "run_id": self.run_id,
                "of_other_length": self.num_of_other_length,
                "not_streamed": sum(not each.is_streamed for each in finished),
                "tokens_unlike_events": sum(not each.adds_up for each in finished),
                "tokens_said_with_events": sum(each.counts_are_said for each in finished),
            },
        }


def replay(
    server: Server,
    workload: Workload,
    options: ReplayOptions,
    vocab_size: int,
    tokenizer: Any = None,
    on_done: Callable[[], None] = lambda: None,
) -> Replay:
    """Send every request of the workload at its time, and return when all have ended; `on_done` is called for each.

    Prompts are token ids below `vocab_size`, or with a tokenizer the text that it makes of them. All are made before
    the clock starts. Requests that fail stop nothing. SIGINT, SIGTERM or SIGHUP ends the replay, and what was measured
    until then is returned; a second one, or one before the clock starts, does what it does elsewhere.
    Raises ServerError if a request of the warm-up fails.
    """

    def body(token_ids: list[int], max_tokens: int) -> bytes:
        prompt = token_ids if tokenizer is None else tokenizer.decode(token_ids, skip_special_tokens=True)
        return options.wording.body(server, prompt, max_tokens)

    rows = zip(
        workload.arrival_s.tolist(), workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True
    )
    exchanges = [Exchange(str(i), *row) for i, row in enumerate(rows)]
    bodies = [body(workload.prompt_token_ids(i, vocab_size), each.max_tokens) for i, each in enumerate(exchanges)]
    warmup = [
        (Exchange(f"warmup-{i}", 0.0, len(ids), _WARMUP_OUTPUT), body(ids, _WARMUP_OUTPUT))
        for i, ids in enumerate(_warmup_prompts(options.warmup, vocab_size, tokenizer))
    ]
    wanted = min(options.max_concurrency or len(exchanges), len(exchanges))
    max_connections = _connections(wanted)
    run_id = uuid.uuid4().hex[:8]

    async def serve() -> tuple[dict[str, int | None], signal.Signals | None]:
        async with open_session(server.root, _noting_when_sent()) as session:
            sender = _Sender(session, server, options.wording, run_id, max_connections)
            if warmup:
                await sender.send_all(warmup, options.drain_limit_s)
            for each, _ in warmup:
                if each.outcome is not RequestStatus.FINISHED:
                    listed = "" if server.is_listed else f"; the server lists {', '.join(server.listed) or 'no models'}"
                    raise ServerError(
                        f"request {each.request_id} of the warm-up was {each.status}: {each.error}{listed}"
                    )
            before = await read_counters(session, server.root)
            stopped_by = await sender.send_until_stopped(
                list(zip(exchanges, bodies, strict=True)), options.drain_limit_s, on_done
            )
            # A server may be asked for nothing more once the run is to end.
            after = {} if stopped_by else await read_counters(session, server.root)
            return counted_between(before, after), stopped_by

    gc.collect()
    gc.freeze()  # What is there stays: no pass over it while tokens come.
    try:
        counted, stopped_by = asyncio.run(serve())
    finally:
        gc.unfreeze()
    return Replay(server, exchanges, counted, wanted, max_connections, run_id, options.wording.ignore_eos, stopped_by)


def _tokens_and_events(exchanges: Sequence[Exchange]) -> tuple[int, int]:
    return sum(each.output_tokens for each in exchanges), sum(len(each.token_s) for each in exchanges)


def _warmup_prompts(num_prompts: int, vocab_size: int, tokenizer: Any) -> Iterator[list[int]]:
    """One token over and over: not the beginning of a prompt to come, which a server might then have cached.

    With a tokenizer it is a token whose text is not empty, as that of a special token is.
    """
    candidates: Sequence[int] = range(vocab_size)
    if tokenizer is not None and num_prompts:
        first = candidates[: 2 * num_prompts + 1000]
        candidates = [i for i in first if tokenizer.decode([i], skip_special_tokens=True).strip()] or first
    for i in range(num_prompts):
        yield [candidates[i % len(candidates)]] * _WARMUP_PROMPT


class _Sender:
    """Sends requests over one session and notes what comes back, on a clock that starts with each set of requests."""

    def __init__(
        self, session: aiohttp.ClientSession, server: Server, wording: Wording, run_id: str, max_connections: int
    ) -> None:
        self._session = session
        self._url = server.root.joinpath(*wording.path.split("/"))
        self._wording = wording
        self._run_id = run_id
        self._places = asyncio.Semaphore(max_connections)
        self._origin = 0.0

    async def send_until_stopped(
        self, requests: Sequence[tuple[Exchange, bytes]], drain_limit_s: float, on_done: Callable[[], None]
    ) -> signal.Signals | None:
        """As `send_all`, but the first SIGINT, SIGTERM or SIGHUP aborts what is unfinished and is returned."""
        task = asyncio.current_task()
        assert task is not None
        received: list[signal.Signals] = []

        def stop(signum: signal.Signals) -> None:
            received.append(signum)
            task.cancel()

        with _told_of_signals(stop):
            try:
                await self.send_all(requests, drain_limit_s, on_done)
            except asyncio.CancelledError:
                if not received:
                    raise
                task.uncancel()
        if not received:
            return None
        for exchange, _ in requests:
            was_sent = math.isfinite(exchange.sent_s)
            exchange.end(
                RequestStatus.ABORTED,
                f"{'unfinished' if was_sent else 'not sent'} when {received[0].name} ended the run",
            )
        return received[0]

    async def send_all(
        self,
        requests: Sequence[tuple[Exchange, bytes]],
        drain_limit_s: float,
        on_done: Callable[[], None] = lambda: None,
    ) -> None:
        """Send each at its time, in order, and wait for the answers, for the last ones until the drain limit."""
        origin = self._origin = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = []
            for exchange, body in requests:
                left = origin + exchange.arrival_s - time.perf_counter()
                if left > 0:
                    await asyncio.sleep(left)
                task = group.create_task(self._send(exchange, body))
                task.add_done_callback(lambda _: on_done())
                tasks.append(task)
            left = origin + requests[-1][0].arrival_s + drain_limit_s - time.perf_counter()
            _, unfinished = await asyncio.wait(tasks, timeout=max(left, 0.0))
            for task in unfinished:
                task.cancel()
        for exchange, _ in requests:
            exchange.end(
                RequestStatus.ABORTED, f"unfinished {drain_limit_s:g} s after the last arrival (--drain-limit)"
            )

    async def _send(self, exchange: Exchange, body: bytes) -> None:
        kept_back = self._places.locked()
        async with self._places:
            exchange.due_s = self._now() if kept_back else exchange.arrival_s
            try:
                await self._exchange(exchange, body)
            except BrokenAnswer as error:
                exchange.fail(f"after {exchange.shown_tokens} tokens: {error}")
            except (aiohttp.ClientError, OSError) as error:
                what = str(error) or type(error).__name__
                exchange.end(
                    RequestStatus.FAILED, f"after {exchange.shown_tokens} tokens the connection failed: {what}"
                )

    async def _exchange(self, exchange: Exchange, body: bytes) -> None:
        headers = {
            "Content-Type": "application/json",
            "X-Request-ID": f"{self._run_id}-{exchange.request_id}",
        }
        context = (exchange, self._now)
        async with self._session.post(
            self._url, data=body, headers=headers, allow_redirects=False, trace_request_ctx=context
        ) as response:
            if response.status == 200:
                await self._read(exchange, response)
                return
            message = message_of(await response.read())
            refused = 400 <= response.status < 500
            exchange.end(
                RequestStatus.REJECTED if refused else RequestStatus.FAILED,
                f"HTTP {response.status}: {message}{self._wording.hint(response.status, message)}",
            )

    async def _read(self, exchange: Exchange, response: aiohttp.ClientResponse) -> None:
        """Take the events of a stream until it ends, or for a while longer once it has said that it ends."""
        events = EventParser()
        with suppress(TimeoutError):
            async with asyncio.timeout(None) as patience:
                end = math.inf
                async for chunk in response.content.iter_any():
                    now_s = self._now()
                    _take(exchange, events.feed(chunk), now_s)
                    if exchange.outcome is not RequestStatus.ACTIVE:
                        left = _AFTER_DONE_S
                    elif exchange.finish_reason:
                        left = _AFTER_FINISH_S
                    else:
                        continue
                    if now_s + left < end:
                        end = now_s + left
                        patience.reschedule(asyncio.get_running_loop().time() + left)
                _take(exchange, events.end(), self._now())
        if exchange.outcome is RequestStatus.ACTIVE and not exchange.finish_reason:
            raise BrokenAnswer(f"the stream ({response.content_type}) ended before [DONE] and without a finish_reason")
        exchange.end(RequestStatus.FINISHED, "")

    def _now(self) -> float:
        return time.perf_counter() - self._origin


def _take(exchange: Exchange, events: Sequence[Event], now_s: float) -> None:
    for event in events:
        if exchange.outcome is not RequestStatus.ACTIVE:
            return
        if exchange.take(event, now_s):
            exchange.end(RequestStatus.FINISHED, "")


@contextmanager
def _told_of_signals(stop: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Have the running loop call `stop` for the first signal to end. A further one is as it was; so are those that are
    ignored, and all outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    taken = {each: handler for each, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def restore() -> None:
        while taken:
            signum, handler = taken.popitem()
            loop.remove_signal_handler(signum)
            signal.signal(signum, handler)

    def handle(signum: signal.Signals) -> None:
        restore()
        stop(signum)

    for signum in taken:
        loop.add_signal_handler(signum, handle, signum)
    try:
        yield
    finally:
        restore()


def _noting_when_sent() -> aiohttp.TraceConfig:
    async def note(_: aiohttp.ClientSession, context: SimpleNamespace, __: Any) -> None:
        if context.trace_request_ctx is not None:
            exchange, now = context.trace_request_ctx
            exchange.sent_s = now()

    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(note)
    return trace


def _connections(wanted: int) -> int:
    """How many connections the limit on open files allows; it is raised for `wanted`, as far as the system lets us."""
    soft, hard = (
        math.inf if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    needed = wanted + _OTHER_FILES
    if soft < needed:
        soft = min(needed, hard)
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (int(soft), resource.RLIM_INFINITY if math.isinf(hard) else int(hard))
        )
    return wanted if soft >= needed else max(int(soft) - _OTHER_FILES, 1)

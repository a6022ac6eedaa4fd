"""A workload replayed over HTTP: each request is sent at its time, whatever became of those before it.

Nothing but the schedule decides when a request is sent, and latencies count from the schedule: a client, a connection
or a cap that holds a request back makes it slower, not later (no coordinated omission).
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import resource
import time
import uuid
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import aiohttp
import numpy as np

from fastserve.config import require_int
from fastserve.errors import ConfigError, ServerError
from fastserve.request import RequestStatus
from harness.http_server import Server, counted_between, message_of, open_session, read_counters
from harness.sse import EventParser
from harness.traces.lengths import FloatArray
from harness.workload import Workload

DEFAULT_VOCABULARY = 1000
"""Token ids below this are in any model's vocabulary."""
_WARMUP_PROMPT, _WARMUP_OUTPUT = 16, 8
_OTHER_FILES = 100
"""Open files that are not connections of a replay, at the most."""
_END_OF_ANSWER_S = 1.0
"""How long the end of an answer may follow its [DONE]; beyond that its connection is closed, not used again."""


@dataclass(frozen=True)
class ReplayOptions:
    """How a workload is replayed. ConfigError for what is out of range."""

    max_concurrency: int | None = None
    """Requests under way at a time; None: all that are due."""
    drain_limit_s: float = 600.0
    """How long after the last scheduled arrival requests may take; what is unfinished then is aborted."""
    warmup: int = 0
    """Short requests before the clock starts."""

    def __post_init__(self) -> None:
        if self.max_concurrency is not None:
            require_int("max_concurrency", self.max_concurrency, 1)
        require_int("warmup", self.warmup, 0)
        if not (math.isfinite(self.drain_limit_s) and self.drain_limit_s >= 0):
            raise ConfigError(f"drain_limit must be a finite number of seconds of at least 0, not {self.drain_limit_s}")


@dataclass(slots=True, eq=False)
class Exchange:
    """A request and its answer as the client sees them, a row of requests.parquet; in seconds from the run's start."""

    request_id: str
    arrival_s: float
    """When it is to be sent."""
    prompt_tokens: int
    """As the server counts them, if it says."""
    max_tokens: int
    due_s: float = math.nan
    """The arrival, or when the cap on concurrency let it go if that is later."""
    sent_s: float = math.nan
    """When its head was written to a connection."""
    token_s: array[float] = field(default_factory=lambda: array("d"))
    """When each event with a token came."""
    outcome: RequestStatus = RequestStatus.ACTIVE
    error: str = ""
    usage_tokens: int = 0
    """Output tokens as the server counts them, if it says."""

    # What a client cannot see.
    first_scheduled_s = queueing_s = swapping_s = execution_s = None
    preemptions = swap_out_bytes = swap_in_bytes = recomputed_tokens = None

    @property
    def status(self) -> str:
        """How it ended."""
        return self.outcome.value

    @property
    def first_token_s(self) -> float:
        """NaN if none came."""
        return self.token_s[0] if self.token_s else math.nan

    @property
    def finished_s(self) -> float:
        """When the last token came; NaN unless it finished."""
        return self.token_s[-1] if self.outcome is RequestStatus.FINISHED else math.nan

    @property
    def output_tokens(self) -> int:
        """As the server counts them; without that, events with a token."""
        return self.usage_tokens or len(self.token_s)

    @property
    def max_token_gap_s(self) -> float:
        """Longest time between two consecutive events with a token."""
        return float(np.diff(self.token_s).max()) if len(self.token_s) > 1 else 0.0

    def take(self, data: bytes, now_s: float) -> None:
        """Note an event of the answer. Raises _BrokenAnswer for one that reports an error or makes no sense."""
        if self.outcome is not RequestStatus.ACTIVE:
            return
        if data == b"[DONE]":
            if not self.token_s:
                raise _BrokenAnswer("the stream held no token")
            self.outcome = RequestStatus.FINISHED
            return
        try:
            event = json.loads(data)
            choices, usage, error = event["choices"], event.get("usage"), event.get("error")
            if usage:
                self.prompt_tokens = int(usage.get("prompt_tokens") or self.prompt_tokens)
                self.usage_tokens = int(usage.get("completion_tokens") or 0)
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _BrokenAnswer(message_of(data)) from None
        if error:
            raise _BrokenAnswer(message_of(data))
        if choices:
            self.token_s.append(now_s)

    def end(self, outcome: RequestStatus, error: str) -> None:
        """It is over, unless it already was."""
        if self.outcome is RequestStatus.ACTIVE:
            self.outcome, self.error = outcome, error


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

    @property
    def lateness_s(self) -> FloatArray:
        """How much later than due each request was sent, of those sent."""
        late = np.array([each.sent_s - each.due_s for each in self.exchanges])
        return late[np.isfinite(late)]

    @property
    def num_of_other_length(self) -> int:
        """Finished requests with more or fewer tokens than were asked for."""
        return sum(each.status == "finished" and each.output_tokens != each.max_tokens for each in self.exchanges)

    @property
    def warnings(self) -> Iterator[str]:
        """What makes the measurement other than it was meant to be."""
        num_kept_back = sum(each.due_s > each.arrival_s for each in self.exchanges)
        if num_kept_back and self.max_connections < self.wanted_connections:
            yield (
                f"{num_kept_back} requests waited for one of {self.max_connections} connections, all that the limit on "
                "open files leaves; raise it (ulimit -n), or say --max-concurrency"
            )
        if self.num_of_other_length:
            yield (
                f"{self.num_of_other_length} of {len(self.exchanges)} requests got another number of tokens than they "
                "asked for: the server may not know ignore_eos, or bounds the length"
            )

    @property
    def meta(self) -> dict[str, Any]:
        """Keys of meta.json: what was measured and how."""
        return {
            "server": {"version": self.server.version, "model": dict(self.server.card)},
            "client": {
                "max_connections": self.max_connections,
                "run_id": self.run_id,
                "of_other_length": self.num_of_other_length,
            },
        }

    def errors(self, *outcomes: RequestStatus) -> list[str]:
        """Why requests did not finish, of those that ended so; of all without outcomes."""
        return [
            f"request {each.request_id}: {each.error}"
            for each in self.exchanges
            if each.error and (each.outcome in outcomes or not outcomes)
        ]


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
    the clock starts. Requests that fail stop nothing.
    Raises ServerError if a request of the warm-up fails.
    """

    def body(token_ids: list[int], max_tokens: int) -> bytes:
        prompt = token_ids if tokenizer is None else tokenizer.decode(token_ids, skip_special_tokens=True)
        content = {
            "model": server.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(content, separators=(",", ":")).encode()

    rows = zip(
        workload.arrival_s.tolist(), workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True
    )
    exchanges = [Exchange(str(i), *row) for i, row in enumerate(rows)]
    bodies = [body(workload.prompt_token_ids(i, vocab_size), each.max_tokens) for i, each in enumerate(exchanges)]
    # One token over and over: not the beginning of a prompt to come, which a server might then have cached.
    warmup = [
        (
            Exchange(f"warmup-{i}", 0.0, _WARMUP_PROMPT, _WARMUP_OUTPUT),
            body([i % vocab_size] * _WARMUP_PROMPT, _WARMUP_OUTPUT),
        )
        for i in range(options.warmup)
    ]
    wanted = min(options.max_concurrency or len(exchanges), len(exchanges))
    max_connections = _connections(wanted)
    run_id = uuid.uuid4().hex[:8]

    async def serve() -> dict[str, int | None]:
        async with open_session(server.root, _noting_when_sent()) as session:
            sender = _Sender(session, server, run_id, max_connections)
            if warmup:
                await sender.send_all(warmup, options.drain_limit_s)
            for each, _ in warmup:
                if each.outcome is not RequestStatus.FINISHED:
                    raise ServerError(f"request {each.request_id} of the warm-up was {each.status}: {each.error}")
            before = await read_counters(session, server.root)
            await sender.send_all(list(zip(exchanges, bodies, strict=True)), options.drain_limit_s, on_done)
            return counted_between(before, await read_counters(session, server.root))

    gc.collect()
    gc.freeze()  # What is there stays: no pass over it while tokens come.
    try:
        return Replay(server, exchanges, asyncio.run(serve()), wanted, max_connections, run_id)
    finally:
        gc.unfreeze()


class _BrokenAnswer(Exception):
    """An answer that cannot be completed; says why."""


class _Sender:
    """Sends requests over one session and notes what comes back, on a clock that starts with each set of requests."""

    def __init__(self, session: aiohttp.ClientSession, server: Server, run_id: str, max_connections: int) -> None:
        self._session = session
        self._url = server.root / "v1" / "completions"
        self._run_id = run_id
        self._places = asyncio.Semaphore(max_connections)
        self._origin = 0.0

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
            except _BrokenAnswer as error:
                exchange.end(RequestStatus.FAILED, f"after {len(exchange.token_s)} tokens: {error}")
            except (aiohttp.ClientError, OSError) as error:
                what = str(error) or type(error).__name__
                exchange.end(
                    RequestStatus.FAILED, f"after {len(exchange.token_s)} tokens the connection failed: {what}"
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
            if response.status != 200:
                refused = 400 <= response.status < 500
                exchange.end(
                    RequestStatus.REJECTED if refused else RequestStatus.FAILED,
                    f"HTTP {response.status}: {message_of(await response.read())}",
                )
                return
            events = EventParser()
            async for chunk in response.content.iter_any():
                now_s = self._now()
                for data in events.feed(chunk):
                    exchange.take(data, now_s)
                if exchange.outcome is RequestStatus.FINISHED:
                    break
            else:
                raise _BrokenAnswer(f"the stream ({response.content_type}) ended before [DONE]")
            with suppress(TimeoutError):
                async with asyncio.timeout(_END_OF_ANSWER_S):
                    await response.read()

    def _now(self) -> float:
        return time.perf_counter() - self._origin


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

"""The sender: each request goes out at its time over one pool of connections, and its answer is read as it comes."""

from __future__ import annotations

import asyncio
import math
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import aiohttp

from fastserve.core.request import RequestStatus
from harness.client.answer import BrokenAnswer, Exchange
from harness.client.request import Wording
from harness.client.server import Server, message_of
from harness.client.sse import Event, EventParser

_OTHER_FILES = 100
"""Upper bound on the open files that are not connections of the replay."""
_AFTER_DONE_S, _AFTER_FINISH_S = 1.0, 10.0
"""Time that the end of an answer may take after its [DONE], or after its finish_reason, which a usage may follow. After
that the answer has ended; its connection is closed and not reused."""


class Sender:
    """Sends requests over one session and records their answers, on a clock that starts with each set of requests."""

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
        """Send as `send_all` does; the first SIGINT, SIGTERM or SIGHUP aborts unfinished requests and is returned."""
        task = asyncio.current_task()
        assert task is not None
        received: list[signal.Signals] = []

        def stop(signum: signal.Signals) -> None:
            received.append(signum)
            task.cancel()

        with _signals_handled(stop):
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
        """Send each request at its time, in order, and wait for the answers until the drain limit."""
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
        """Read the events of a stream until it ends; once it says that it has ended, wait for its end only briefly."""
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
def _signals_handled(stop: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Let the running loop call `stop` for the first signal to end.

    Later signals, ignored signals, and all signals outside the main thread keep their handlers.
    """
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


def note_when_sent() -> aiohttp.TraceConfig:
    """Make a trace that sets `sent_s` of an exchange when its headers are sent."""

    async def note(_: aiohttp.ClientSession, context: SimpleNamespace, __: Any) -> None:
        if context.trace_request_ctx is not None:
            exchange, now = context.trace_request_ctx
            exchange.sent_s = now()

    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(note)
    return trace


def max_connections_for(wanted: int) -> int:
    """Raise the limit on open files for `wanted` connections as far as allowed; return how many it then allows."""
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

"""The engine's thread: takes requests from the event loop, steps the engine, and hands tokens back.

Commands go to the thread by a queue. Tokens go to the event loop by one call an iteration. The engine never waits for
the event loop, so it never waits for a client.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from fastserve.core.errors import failure_reason
from fastserve.core.request import Request, RequestStatus, SamplingParams
from fastserve.engine import EngineView, Job, Observer, Observers
from fastserve.scheduler import Iteration
from fastserve.server.engine.streams import Token, TokenStream, finish_reason, token_of
from fastserve.server.model import ServedModel

T = TypeVar("T")

_MAX_WAIT_S = 0.005
"""Longest wait for a transfer or a stage before the thread looks for commands."""
_FINISHES_REMEMBERED = 64
_MAX_RETRY_AFTER_S = 60
_LAST_ITERATION_S = 10.0
"""How long `stop` waits for the iteration in progress."""


class EngineThread:
    """Builds an engine and runs it, in a thread of its own. Its public methods are for the event loop."""

    def __init__(self, build: Callable[[], ServedModel], observer: Observer) -> None:
        """Build the model in the thread, since some settings are a thread's own, and wait for it.

        `observer` is called in the thread. Raises what `build` raises.
        """
        self.error: Exception | None = None
        """What ended the engine; None while it takes requests."""
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_lock = threading.Lock()
        """Held during calls into the loop, which must not close meanwhile."""
        self._on_failure: Callable[[Exception], None] | None = None
        self._open: dict[str, TokenStream] = {}
        """Unfinished requests, as the event loop knows them."""
        self._finished_at: deque[float] = deque(maxlen=_FINISHES_REMEMBERED)
        self._busy_since = 0.0
        """Arrival of the first request since the last time that none was unfinished."""
        self._delivery = _Delivery()
        self._idle = False
        """Whether the thread waits for a command, with nothing else to do."""
        start_s = time.monotonic()
        built: Future[ServedModel] = Future()
        self._thread = threading.Thread(target=self._main, args=(build, observer, built), name="engine", daemon=True)
        self._thread.start()
        self.model = built.result()
        self.clock = self.model.engine.clock
        self.load_s = time.monotonic() - start_s
        """Seconds to build the model."""

    # -- in the event loop ---------------------------------------------------------------------------------------

    def attach(self, on_failure: Callable[[Exception], None]) -> None:
        """Hand tokens to the running event loop from now on. `on_failure` takes what ends the engine."""
        with self._loop_lock:
            self._loop, self._on_failure = asyncio.get_running_loop(), on_failure

    def detach(self) -> None:
        """Call the event loop no more, since it may be closed."""
        with self._loop_lock:
            self._loop = None

    @property
    def failure(self) -> str:
        """What ended the engine, in words; empty while it runs."""
        return "" if self.error is None else failure_reason(self.error)

    @property
    def standstill_s(self) -> float:
        """Seconds since the last iteration ended while there is work; 0 while there is none."""
        return 0.0 if self._idle else time.monotonic() - self._delivery.progress_s

    @property
    def num_unfinished(self) -> int:
        """Requests that were added and have neither ended nor been aborted."""
        return len(self._open)

    def add(self, request_id: str, prompt: Sequence[int], params: SamplingParams) -> TokenStream:
        """Take a request, which arrives now. `Engine.rejection_reason` must be empty for it."""
        stream = TokenStream(request_id, params.max_tokens)
        request = Request.from_tokens(request_id, self.clock.now(), prompt)
        request.max_output_tokens = params.max_tokens
        if not self._open:
            self._busy_since = request.arrival_s
        self._open[request_id] = stream
        self._command(lambda: self._add(request, params, stream))
        return stream

    def abort(self, stream: TokenStream, reason: str = "") -> None:
        """End a request, if it has not ended. With a reason its stream fails, else it must not be read again."""
        if self._open.pop(stream.request_id, None) is not None:
            if reason:
                stream.fail(reason)
            self._command(lambda: self._abort(stream.request_id))

    def abort_all(self, reason: str) -> int:
        """End all requests; their streams fail with `reason`. Returns how many there were."""
        streams = list(self._open.values())
        for stream in streams:
            self.abort(stream, reason)
        return len(streams)

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` in the engine's thread, between two iterations, and return its result."""
        future: Future[T] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._command(command)
        return await asyncio.wrap_future(future)

    def retry_after_s(self, num_requests: int) -> int:
        """Return the seconds in which `num_requests` requests will probably finish, by the rate of the last ones.

        Before two have finished, the estimate is the time that the first request has waited.
        """
        now = self.clock.now()
        if len(self._finished_at) >= 2:
            seconds = num_requests * (now - self._finished_at[0]) / len(self._finished_at)
        else:
            seconds = now - self._busy_since if self._open else 0.0
        return max(1, min(_MAX_RETRY_AFTER_S, math.ceil(seconds)))

    def stop(self) -> bool:
        """End the thread after the iteration in progress, and close the model. Returns whether the thread has ended.

        A thread whose policy or kernel hangs never ends; the process must end without it.
        """
        self.detach()
        self._command(self._set_stopping)
        self._thread.join(_LAST_ITERATION_S)
        return not self._thread.is_alive()

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake.set()

    def _hand_over(self, tokens: list[tuple[TokenStream, Token | str]]) -> None:
        for stream, token in tokens:
            if isinstance(token, str):
                self._open.pop(stream.request_id, None)
                stream.fail(token)
                continue
            if token.finish_reason is not None:
                self._open.pop(stream.request_id, None)
                self._finished_at.append(self.clock.now())
            stream.put(token)

    # -- in the engine's thread ----------------------------------------------------------------------------------

    def _main(
        self,
        build: Callable[[], ServedModel],
        observer: Observer,
        built: Future[ServedModel],
    ) -> None:
        try:
            model = build()
        except BaseException as error:
            built.set_exception(error)
            return
        self._engine = engine = model.engine
        engine.observer = Observers(observer, self._delivery)
        self._delivery.progress_s = time.monotonic()
        built.set_result(model)
        try:
            while not self._stopping:
                try:
                    self._turn()
                except Exception as error:
                    self.error = error
                    self._delivery.fail_all(failure_reason(error))
                    self._tell_loop(self._on_failure, error)
                tokens = self._delivery.take()
                if tokens:
                    self._tell_loop(self._hand_over, tokens)
        finally:
            model.close()

    def _turn(self) -> None:
        """Run a command; if there is none, an iteration; if there is nothing to compute, wait for a command."""
        engine = self._engine
        if self._commands:
            self._commands.popleft()()
        elif self.error is None and (engine.has_unfinished or engine.executor.num_transfers_in_flight):
            engine.step(engine.clock.now() + _MAX_WAIT_S)
            engine.iterations.clear()  # A record of all iterations would grow without end.
        else:
            self._idle = True
            self._wake.wait()
            self._wake.clear()
            self._delivery.progress_s = time.monotonic()
            self._idle = False

    def _tell_loop(self, callback: Callable[[Any], None] | None, about: Any) -> None:
        with self._loop_lock:
            if self._loop is not None and callback is not None:
                self._loop.call_soon_threadsafe(callback, about)

    def _add(self, request: Request, params: SamplingParams, stream: TokenStream) -> None:
        self._delivery.expect(stream)
        if self.error is not None:
            self._delivery.fail(stream, self.failure)
            return
        job = self._engine.add_request(request, params)
        if job.is_done:
            self._delivery.on_done(job)

    def _abort(self, request_id: str) -> None:
        self._delivery.forget(request_id)
        self._engine.abort(request_id)

    def _set_stopping(self) -> None:
        self._stopping = True


class _Delivery(Observer):
    """Gathers a step's tokens for their streams."""

    def __init__(self) -> None:
        self._streams: dict[str, TokenStream] = {}
        self._gathered: list[tuple[TokenStream, Token | str]] = []
        self.progress_s = time.monotonic()
        """When an iteration last ended, or the thread last left off waiting for a command."""

    def expect(self, stream: TokenStream) -> None:
        self._streams[stream.request_id] = stream

    def forget(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    def fail(self, stream: TokenStream, reason: str) -> None:
        self.forget(stream.request_id)
        self._gathered.append((stream, reason))

    def fail_all(self, reason: str) -> None:
        for stream in list(self._streams.values()):
            self.fail(stream, reason)

    def take(self) -> list[tuple[TokenStream, Token | str]]:
        gathered, self._gathered = self._gathered, []
        return gathered

    def on_iteration(self, engine: EngineView, iteration: Iteration, start_s: float, end_s: float) -> None:
        self.progress_s = time.monotonic()

    def on_token(self, job: Job, token: int, at_s: float, previous_s: float | None) -> None:
        stream = self._streams.get(job.request.request_id)
        if stream is not None and not job.is_done:  # `on_done` adds the last token.
            self._gathered.append((stream, token_of(job, token, None)))

    def on_done(self, job: Job) -> None:
        request = job.request
        stream = self._streams.get(request.request_id)
        if stream is None:
            return
        if request.status is RequestStatus.FINISHED:
            self.forget(request.request_id)
            self._gathered.append((stream, token_of(job, request.token_ids[-1], finish_reason(job))))
        else:
            self.fail(stream, job.error or f"the request was {request.status.value}")

"""The server: the engine's thread, and the rules by which it takes requests, whatever their route."""

from __future__ import annotations

import math
import time
from typing import Literal

from fastapi import Request
from starlette.responses import Response

from fastserve.server.answers.answer import Answer
from fastserve.server.answers.choices import Prompt
from fastserve.server.answers.sending import EventStream, unless_disconnected
from fastserve.server.engine.streams import StreamEnded
from fastserve.server.engine.thread import EngineThread
from fastserve.server.http.body import Bodies, BodyLimits
from fastserve.server.http.errors import APIError, bad_request, shown
from fastserve.server.http.front import Load
from fastserve.server.http.offload import Offload
from fastserve.server.monitoring.metrics import ServerMetrics
from fastserve.server.monitoring.state import RecentRequests, StateReader
from fastserve.server.options import ServerOptions
from fastserve.server.prompts import Prompts
from fastserve.server.protocol.generation import GenerationRequest

Status = Literal["ready", "draining", "failed", "stalled"]


class Server:
    """The engine's thread, and what the routes need beside it."""

    def __init__(
        self, options: ServerOptions, engine: EngineThread, metrics: ServerMetrics, recent: RecentRequests
    ) -> None:
        self.options = options
        self.engine = engine
        self.metrics = metrics
        self.state = StateReader(engine, metrics.totals, recent)
        offload, limits = Offload(), BodyLimits.of_context(engine.model.engine.longest_request)
        self.bodies = Bodies(limits, offload)
        self.prompts = Prompts(engine.model, limits, offload)
        self.load = Load()
        self.stop_by: float | None = None
        """Time on the monotonic clock until which the requests in progress may go on; None unless draining."""
        self.started_at = int(time.time())
        self._started = time.monotonic()

    # -- status --------------------------------------------------------------------------------------------------

    @property
    def draining(self) -> bool:
        """Whether the server was told to stop and finishes the requests in progress."""
        return self.stop_by is not None

    @property
    def status(self) -> Status:
        """`ready` if requests are taken, else why not."""
        if self.engine.error is not None:
            return "failed"
        if self.draining:
            return "draining"
        return "stalled" if self.engine.standstill_s > self.options.stall_timeout_s else "ready"

    @property
    def reason(self) -> str:
        """Why no requests are taken; empty while they are."""
        match self.status:
            case "failed":
                return f"the engine has failed: {self.engine.failure}"
            case "draining":
                return "the server is stopping"
            case "stalled":
                return f"the engine is stalled: no iteration has ended for {self.engine.standstill_s:.0f} s"
        return ""

    @property
    def uptime_s(self) -> float:
        """Seconds since the server was created."""
        return time.monotonic() - self._started

    @property
    def retry_after_s(self) -> int:
        """Estimated seconds until requests are taken again: to drain, if draining, and to load the model."""
        seconds = self.engine.load_s
        if self.stop_by is not None and self.engine.error is None:
            left_s = max(0.0, self.stop_by - time.monotonic())
            seconds += min(left_s, self.engine.retry_after_s(self.engine.num_unfinished))
        return max(1, math.ceil(seconds))

    # -- requests ------------------------------------------------------------------------------------------------

    def require_ready(self, num_requests: int) -> None:
        """Raise APIError unless `num_requests` more requests can be taken."""
        if reason := self.reason:
            raise self._unavailable(reason)
        limit, unfinished = self.options.max_requests, self.engine.num_unfinished
        if num_requests > limit:
            raise bad_request(f"{num_requests} choices in one request; this server takes {limit} at most", "prompt")
        if unfinished + num_requests > limit:
            self.metrics.refused(num_requests)
            seconds = self.engine.retry_after_s(unfinished + num_requests - limit)
            raise APIError(
                429,
                f"the queue is full: {unfinished} of {limit} requests are unfinished; try again in {seconds} s",
                code="queue_full",
                headers={"retry-after": str(seconds)},
            )

    def require_model(self, name: str | None) -> None:
        """Raise APIError 404 unless the model called `name` is served."""
        names = self.engine.model.names
        if name is not None and name not in names:
            known = ", ".join(map(repr, names))
            raise APIError(
                404, f"model {shown(name)} is not served here; this server has {known}",
                param="model", code="model_not_found",
            )  # fmt: skip

    async def respond(
        self, answer_class: type[Answer], body: GenerationRequest, prompts: list[Prompt], http: Request
    ) -> Response:
        """Give the prompts to the engine and return the answer, whole or as events."""
        self.prompts.require_bounded(prompts)
        self.bodies.release(http)
        answer = answer_class(body, self.engine, prompts, http.state.request_id)
        self.load.begin(http)
        if body.stream:
            return EventStream(answer)
        try:
            response = await unless_disconnected(answer, answer.whole(), http.receive)
        except StreamEnded as error:
            raise self._unavailable(str(error)) from error
        return response or Response(status_code=499)  # The client has disconnected.

    def _unavailable(self, reason: str) -> APIError:
        """Return an error with status 503 and the seconds until requests are probably taken again."""
        return APIError(503, reason, code=self.status, headers={"retry-after": str(self.retry_after_s)})

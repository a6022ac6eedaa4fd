"""A server that answers as an OpenAI-compatible one does, or as a script says: real sockets, a thread of its own."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

DONE = b"data: [DONE]\n\n"


def token(text: str = " w") -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "text": text}], "usage": None}).encode() + b"\n\n"


def chunk(**content: Any) -> bytes:
    """An event of this content."""
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def delta(finish_reason: str | None = None, **content: Any) -> bytes:
    """An event of a chat."""
    return chunk(choices=[{"index": 0, "delta": content, "finish_reason": finish_reason}])


def usage(prompt_tokens: int, completion_tokens: int) -> bytes:
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return b"data: " + json.dumps({"choices": [], "usage": counts}).encode() + b"\n\n"


@dataclass
class Call:
    """One request for a completion or a chat."""

    server: OpenAIServer
    request: web.Request
    body: dict[str, Any]

    @property
    def name(self) -> str:
        """The workload's name of it, which X-Request-ID ends with."""
        return self.request.headers["X-Request-ID"].partition("-")[2]

    @property
    def is_completion(self) -> bool:
        """Whether it has a prompt; else it is a chat."""
        return "prompt" in self.body

    async def stream(self, *chunks: bytes | float) -> web.StreamResponse:
        """Begin a stream with these chunks; a number is a pause, in seconds."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(self.request)
        for each in chunks:
            if isinstance(each, bytes):
                await response.write(each)
            else:
                await asyncio.sleep(each)
        return response

    async def others(self, count: int) -> None:
        """Wait until the server has been asked for `count` completions in all."""
        async with self.server.asked:
            await self.server.asked.wait_for(lambda: len(self.server.calls) >= count)

    def cut(self) -> None:
        """Break the connection off."""
        assert self.request.transport is not None
        self.request.transport.abort()


Script = Callable[[Call], Awaitable[web.StreamResponse]]


async def complete(call: Call) -> web.StreamResponse:
    """As many tokens as were asked for, each by itself, and how many they were."""
    count = call.body["max_tokens"]
    response = await call.stream()
    for _ in range(count):
        await response.write(token() if call.is_completion else delta(content=" w"))
        await asyncio.sleep(0.002)  # A client that read several at once would take the answer for one kept back.
    await response.write(usage(len(call.body["prompt"]) if call.is_completion else 5, count))
    await response.write(DONE)
    return response


def refuse(status: int, content: object, **headers: str) -> Script:
    """An answer that is no stream."""

    async def script(_: Call) -> web.StreamResponse:
        return web.json_response(content, status=status, headers=headers)

    return script


def say(*chunks: bytes | float) -> Script:
    """A stream of these chunks and pauses, whatever was asked for."""

    async def script(call: Call) -> web.StreamResponse:
        return await call.stream(*chunks)

    return script


async def never(call: Call) -> web.StreamResponse:
    """Begins, and does not go on until the client has left."""
    await call.stream(token())
    try:
        return await asyncio.Future()
    finally:
        call.server.left.put(call.name)


@dataclass
class OpenAIServer:
    """What it says of itself, how it answers (`scripts` by name, `script` for all others), and what it was asked."""

    script: Script = complete
    scripts: Mapping[str, Script] = field(default_factory=dict)
    models: object = field(default_factory=lambda: {"data": [{"id": "tiny", "owned_by": "someone"}]})
    models_status: int = 200
    not_ready: list[tuple[int, Mapping[str, str]]] = field(default_factory=list)
    """Status and headers of the answers that GET /v1/models gives before it gives the models."""
    endpoint: str = "/v1/completions"
    """The one kind of request it knows."""
    version: str | None = None
    metrics: list[str] = field(default_factory=list)
    """What GET /metrics gives, one after the other; 404 when there is none left."""
    calls: list[Call] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    """Of every request, for whatever."""
    left: queue.Queue[str] = field(default_factory=queue.Queue)
    """Names of those whose client left, under `never`."""
    num_active: int = 0
    most_active: int = 0
    """At a time."""
    asked: asyncio.Condition = field(default_factory=asyncio.Condition)

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve until left; yields the address."""
        app = web.Application(middlewares=[self._note_headers])
        app.router.add_get("/v1/models", self._list_models)
        app.router.add_get("/version", self._say_version)
        app.router.add_get("/metrics", self._say_metrics)
        app.router.add_post(self.endpoint, self._complete)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()

        async def start() -> None:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()

        try:
            asyncio.run_coroutine_threadsafe(start(), loop).result()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    @web.middleware
    async def _note_headers(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        self.headers.append(dict(request.headers))
        return await handler(request)

    async def _list_models(self, _: web.Request) -> web.Response:
        if self.not_ready:
            status, headers = self.not_ready.pop(0)
            return web.json_response({"error": {"message": "loading"}}, status=status, headers=headers)
        return web.json_response(self.models, status=self.models_status)

    async def _say_version(self, _: web.Request) -> web.Response:
        if self.version is None:
            raise web.HTTPNotFound
        return web.json_response({"version": self.version})

    async def _say_metrics(self, _: web.Request) -> web.Response:
        if not self.metrics:
            raise web.HTTPNotFound
        return web.Response(text=self.metrics.pop(0))

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        call = Call(self, request, await request.json())
        self.num_active += 1
        self.most_active = max(self.most_active, self.num_active)
        try:
            async with self.asked:
                self.calls.append(call)
                self.asked.notify_all()
            return await self.scripts.get(call.name, self.script)(call)
        finally:
            self.num_active -= 1

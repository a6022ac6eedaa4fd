"""Running the server: its address, its signals, its end."""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn
import uvloop

from fastserve.engine import Observers
from fastserve.errors import ConfigError, FastServeError
from fastserve.server.app import Server, ServerOptions, create_app
from fastserve.server.engine_thread import EngineThread
from fastserve.server.metrics import ServerMetrics
from fastserve.server.model import ModelOptions, load_served_model
from fastserve.server.state import RecentRequests

_BACKLOG = 2048
_LAST_WORDS_S = 2.0
"""Time to tell those who are cut off that they are, before their connections are closed."""
_SWITCH_INTERVAL_S = 0.0005
"""How long the engine's thread and the event loop keep each other from Python at the most; 5 ms by default."""


class ServingError(FastServeError):
    """The server ended although nobody told it to, or before it had finished what it had begun."""


def serve(model_options: ModelOptions, options: ServerOptions, host: str, port: int) -> None:
    """Load the model and serve it until SIGTERM or SIGINT.

    Then nobody new is taken, what is unfinished goes on for at most the drain timeout, and this returns; a second
    signal cuts it short. Raises ConfigError, before the model is loaded, for an address that cannot be had; what
    `load_served_model` raises; ServingError if the engine failed or requests were cut off.
    """
    with bound_socket(host, port) as listener:
        _allow_open_files()
        metrics, recent = ServerMetrics(), RecentRequests()
        engine = EngineThread(partial(load_served_model, model_options), Observers(metrics, recent))
        try:
            # What is there now stays, and need not be looked through for garbage while somebody waits for a token.
            gc.collect()
            gc.freeze()
            uvloop.run(run_server(Server(options, engine, metrics, recent), listener))
        finally:
            engine.stop()


@contextmanager
def bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that has the address; port 0 is any free one. It is not listened to yet."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {host} --port {port}: {error}") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise _taken(host, port, error) from error
        yield listener


def http_server(server: Server) -> uvicorn.Server:
    """What speaks HTTP for it; leaves signals to others."""
    config = uvicorn.Config(
        create_app(server),
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=75,
        backlog=_BACKLOG,
    )
    return _HTTPServer(config)


async def run_server(server: Server, listener: socket.socket) -> None:
    """Serve until told to stop; see `serve`."""
    http = http_server(server)
    loop = asyncio.get_running_loop()
    num_cut_off = 0

    def cut_off(why: str) -> None:
        nonlocal num_cut_off
        num_cut_off += server.engine.abort_all(why)
        loop.call_later(_LAST_WORDS_S, hang_up)

    def hang_up() -> None:
        """On those who do not read what they are told."""
        nonlocal num_cut_off
        connections = list(http.server_state.connections)
        num_cut_off = max(num_cut_off, len(connections))
        for connection in connections:
            connection.transport.abort()

    def drain(name: str) -> None:
        if server.draining:
            cut_off("the server was told to stop at once")
            return
        server.draining = http.should_exit = True
        count = server.engine.num_unfinished
        _say(f"{name}: finishing {count} requests, for at most {server.options.drain_timeout_s:g} s")
        loop.call_later(server.options.drain_timeout_s, cut_off, "the server is stopping and could not wait longer")

    def failed(error: Exception) -> None:
        if not isinstance(error, FastServeError):  # A bug, of a policy perhaps.
            traceback.print_exception(error)
        http.should_exit = True
        loop.call_later(_LAST_WORDS_S, hang_up)

    host, port = listener.getsockname()[:2]
    try:
        listener.listen(_BACKLOG)
    except OSError as error:  # Somebody else was quicker while the model was loaded.
        raise _taken(host, port, error) from error
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    server.engine.attach(failed)
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, drain, signum.name)
    model = server.engine.model
    shown = f"[{host}]" if ":" in host else host
    _say(f"serving {model.name} by {model.policy} at http://{shown}:{port}")
    if server.options.api_key is None and not _is_loopback(host):
        _say(f"warning: anyone who can reach {host} can use this server; --api-key asks for a key")
    try:
        await http.serve(sockets=[listener])
    finally:
        server.engine.detach()
    if server.engine.error is not None:
        raise ServingError(f"the engine has failed: {server.engine.error}") from server.engine.error
    if num_cut_off:
        raise ServingError(f"{num_cut_off} requests were cut off; a longer --drain-timeout lets them finish")


class _HTTPServer(uvicorn.Server):
    """One that leaves signals to us."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _taken(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(f"cannot serve at {host}:{port}: {error.strerror}; choose another --port")


def _allow_open_files() -> None:
    """As many as may be: each client has one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host in ("::1", "localhost")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

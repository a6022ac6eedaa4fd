"""Running the server: its address, signals, its end."""

from __future__ import annotations

import asyncio
import errno
import gc
import resource
import signal
import socket
import ssl
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn
import uvloop

from fastserve.core.config import CacheConfig, EngineOptions
from fastserve.core.errors import ConfigError, FastServeError
from fastserve.core.files import check_writable
from fastserve.engine import Observers, Timeline
from fastserve.server.app import create_app
from fastserve.server.engine.thread import EngineThread
from fastserve.server.http.half_open import http_protocol
from fastserve.server.http.hosts import is_loopback
from fastserve.server.http.log import logger, say, start_log
from fastserve.server.model import load_served_model
from fastserve.server.monitoring.metrics import ServerMetrics
from fastserve.server.monitoring.state import RecentRequests
from fastserve.server.options import ModelOptions, ServerOptions
from fastserve.server.service import Server

_BACKLOG = 2048
_LAST_WORDS_S = 2.0
"""Time to send errors to clients that are cut off, before their connections are closed; after a failure, also the time
in which /health says so."""
_POLL_S = 0.02
"""How often a draining server checks whether all requests are answered."""
_SWITCH_INTERVAL_S = 0.0005
"""How long the engine's thread and the event loop hold the interpreter at most; Python's default is 5 ms."""


class ServingError(FastServeError):
    """The server ended without being told to, or cut requests off."""


def serve(model_options: ModelOptions, options: ServerOptions) -> None:
    """Load the model and serve it until SIGTERM, SIGHUP or SIGINT.

    It then refuses new requests, finishes those in progress for at most the drain timeout, and returns. A second signal
    cuts them off at once.

    Raises before the model is loaded: ConfigError for an unusable address or certificate, OutputError for a timeline
    that cannot be written. Raises later: what `load_served_model` raises; ServingError if the engine failed or requests
    were cut off.
    """
    start_log(options.log_level)
    require_certificate(options)
    timeline = Timeline()
    if options.timeline is not None:
        check_writable(options.timeline)
    with bound_socket(options.host, options.port) as listener:
        _allow_open_files()
        metrics, recent = ServerMetrics(), RecentRequests()
        watching = [metrics, recent, *([] if options.timeline is None else [timeline])]
        engine = EngineThread(partial(load_served_model, model_options), Observers(*watching))
        ended = False
        if model_options.backend == "engine":
            say(_pools(engine.model.engine.kv.config, model_options.engine))
        try:
            # Present objects stay: without them garbage collection, which delays tokens, is short.
            gc.collect()
            gc.freeze()
            uvloop.run(run_server(Server(options, engine, metrics, recent), listener))
        finally:
            ended = engine.stop()
            if not ended:
                logger.error("the engine's thread hangs; the process ends without it")
            elif options.timeline is not None:
                timeline.write(options.timeline)
                say(f"wrote {options.timeline}")
        if not ended:
            raise ServingError("the engine's thread hangs: its policy, or its device, does not return")


@contextmanager
def bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound to the address, not yet listening. Port 0 is any free port. Raises ConfigError if that fails."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
    except (OSError, OverflowError, UnicodeError) as error:
        raise _unusable(host, port, error) from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise _unusable(host, port, error) from error
        yield listener


def require_certificate(options: ServerOptions) -> None:
    """Raise ConfigError unless the certificate and its key, if given, can be read and belong together."""
    certificate, key = options.ssl_certfile, options.ssl_keyfile
    if certificate is None:
        return
    for name, path in (("--ssl-certfile", certificate), ("--ssl-keyfile", key)):
        try:
            if path is not None:
                path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{name} {path}: {error.strerror}") from error
    try:
        # With an empty password OpenSSL does not ask for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"--ssl-certfile {certificate} and --ssl-keyfile {key or certificate} are not a certificate in PEM format "
            f"with its unencrypted key: {error}"
        ) from error


def http_server(server: Server) -> uvicorn.Server:
    """Return the HTTP server of `server`, which leaves signals to its caller."""
    config = uvicorn.Config(
        create_app(server),
        http=http_protocol(server.options.receive_timeout_s),
        ws="none",
        log_config=None,
        access_log=False,
        ssl_certfile=server.options.ssl_certfile,
        ssl_keyfile=server.options.ssl_keyfile,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=75,
        backlog=_BACKLOG,
    )
    return _HTTPServer(config)


async def run_server(server: Server, listener: socket.socket) -> None:
    """Serve until told to stop, as `serve` says."""
    http = http_server(server)
    loop = asyncio.get_running_loop()
    num_cut_off = 0
    draining: asyncio.Task[None] | None = None

    def cut_off(why: str) -> None:
        nonlocal num_cut_off
        num_cut_off += server.engine.abort_all(why)
        http.should_exit = True
        loop.call_later(_LAST_WORDS_S, hang_up)

    def hang_up() -> None:
        """Close the connections of clients that have not read the end of their answers."""
        nonlocal num_cut_off
        connections = list(http.server_state.connections)
        num_cut_off = max(num_cut_off, len(connections))
        for connection in connections:
            connection.transport.abort()

    async def exit_when_answered() -> None:
        """Stop accepting connections when all requests are answered. Until then /health says that the server drains."""
        while server.load.num_requests or server.engine.num_unfinished:
            await asyncio.sleep(_POLL_S)
        http.should_exit = True

    def drain(name: str) -> None:
        nonlocal draining
        if draining is not None:
            cut_off("the server was told to stop at once")
            return
        timeout_s = server.options.drain_timeout_s
        server.stop_by = time.monotonic() + timeout_s
        say(f"{name}: finishing {server.engine.num_unfinished} requests, for at most {timeout_s:g} s")
        draining = loop.create_task(exit_when_answered())
        loop.call_later(timeout_s, cut_off, "the server is stopping and could not wait longer")

    def exit_failed() -> None:
        http.should_exit = True
        loop.call_later(_LAST_WORDS_S, hang_up)

    def failed(error: Exception) -> None:
        if not isinstance(error, FastServeError):  # A bug, perhaps in a policy.
            traceback.print_exception(error)
        loop.call_later(_LAST_WORDS_S, exit_failed)

    host, port = listener.getsockname()[:2]
    try:
        listener.listen(_BACKLOG)
    except OSError as error:  # Another process took the port while the model was loaded.
        raise _unusable(host, port, error) from error
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    server.engine.attach(failed)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup ignores SIGHUP.
            loop.add_signal_handler(signum, drain, signum.name)
    model = server.engine.model
    shown = f"[{host}]" if ":" in host else host
    scheme = "http" if server.options.ssl_certfile is None else "https"
    say(f"serving {model.name} by {model.policy} at {scheme}://{shown}:{port}")
    if server.options.api_key is None and not is_loopback(host):
        logger.warning("every client that can reach %s can use this server; --api-key asks for a key", host)
    try:
        await http.serve(sockets=[listener])
    finally:
        server.engine.detach()
    if server.engine.error is not None:
        raise ServingError(f"the engine has failed: {server.engine.failure}") from server.engine.error
    if num_cut_off:
        raise ServingError(f"{num_cut_off} requests were cut off; a longer --drain-timeout lets them finish")


class _HTTPServer(uvicorn.Server):
    """Leaves signals to the caller."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _pools(cache: CacheConfig, given: EngineOptions) -> str:
    """Return the sizes of the cache's pools, and the options that set them."""
    sizes = [
        f"{blocks:,} blocks ({_size(blocks * cache.block_bytes)}) {where}"
        for blocks, where in ((cache.num_gpu_blocks, "on the device"), (cache.num_host_blocks, "in host memory"))
    ]
    chosen = {"num_gpu_blocks": given.num_gpu_blocks, "num_host_blocks": given.num_host_blocks}
    if given.swap_space_gib_per_gpu is not None:
        del chosen["num_host_blocks"]
    unset = [f"--set {name}=N" for name, value in chosen.items() if value is None]
    why = f"; sized by the free memory, {' and '.join(unset)} to choose" if unset else ""
    return f"KV cache: {' and '.join(sizes)}, of {cache.block_size} tokens each{why}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _unusable(host: str, port: int, error: Exception) -> ConfigError:
    """Return an error that says what is wrong with an address, and with which of its parts."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, socket.gaierror | UnicodeError):
        return ConfigError(
            f"--host {host} is neither an address nor a name that can be resolved ({error}); give one of this "
            "machine's addresses, 127.0.0.1 for this machine only or 0.0.0.0 for every network"
        )
    if number == errno.EADDRINUSE:
        return ConfigError(f"port {port} of {host} is in use; choose another --port, 0 for any free one")
    if number == errno.EADDRNOTAVAIL:
        return ConfigError(
            f"--host {host} is not an address of this machine; give one that is, 127.0.0.1 for this machine only or "
            "0.0.0.0 for every network"
        )
    if number in (errno.EACCES, errno.EPERM):
        return ConfigError(f"port {port} of {host} needs privileges; choose a --port from 1024 on")
    why = error.strerror if isinstance(error, OSError) and error.strerror else error
    return ConfigError(f"cannot serve at --host {host} --port {port}: {why}")


def _allow_open_files() -> None:
    """Raise the limit on open files as far as allowed: each client has one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

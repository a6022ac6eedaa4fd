"""Connect this process to the engine as one of its ranks."""

from __future__ import annotations

import socket
import sys
import time

from torch.distributed import TCPStore

from fastserve.core.errors import ConfigError, FastServeError
from fastserve.runtime.parallel.channel import Channel, parse_address
from fastserve.runtime.worker.rank import Identity, Rank

_CONNECT_S = 60.0
"""Most time to wait for an engine that is started after its ranks."""
_SILENCE_S = 8.0
"""An engine whose machine is unreachable for so long has gone."""


def run_rank(engine: str, store: str | None, model: str | None) -> None:
    """Connect to the engine, and serve it until it says stop.

    Args:
        engine: HOST:PORT at which it waits.
        store: HOST:PORT of the process group's store; None: torchrun's.
        model: where this machine keeps the model; None: where the engine says.

    Raises:
        ConfigError: the environment names no rank, or there is no engine at that address.
        FastServeError: this rank failed.
    """
    identity = Identity.from_environment()
    host, port = parse_address(engine, "--engine")
    channel = Channel(_connect(host, port), _SILENCE_S)
    group_store = None
    if store is not None:
        store_host, store_port = parse_address(store, "--store")
        group_store = TCPStore(store_host, store_port, is_master=False)
    try:
        Rank(channel, identity, model, group_store).serve()
    except FastServeError:
        if store is None:
            raise
        sys.exit(1)  # The engine that started this process reports the error.


def _connect(host: str, port: int) -> socket.socket:
    deadline = time.monotonic() + _CONNECT_S
    while True:
        try:
            return socket.create_connection((host, port), timeout=5.0)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"no engine at {host}:{port} within {_CONNECT_S:.0f} s ({error}); start it, or correct --engine"
                ) from None
            time.sleep(0.5)

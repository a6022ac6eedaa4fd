"""Rendezvous: start or await the ranks, until each has connected and said hello."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time

from fastserve.core.errors import ConfigError, RankError
from fastserve.runtime.executors.ranks.peer import Peer
from fastserve.runtime.executors.ranks.processes import LocalProcesses
from fastserve.runtime.parallel.channel import Channel, ChannelClosed, parse_address
from fastserve.runtime.worker.protocol import RankConfig

_HELLO_S = 10.0
"""Most time from a rank's connection to its hello."""


def meet(config: RankConfig, address: str | None, processes: LocalProcesses, deadline: float) -> list[Peer]:
    """Wait until every rank has said hello; returns them by rank.

    Args:
        config: of the ranks.
        address: HOST:PORT at which ranks of torchrun connect, with the secret FASTSERVE_TOKEN; None: start them here.
        processes: starts the ranks of this machine.
        deadline: seconds on the monotonic clock.

    Raises:
        ConfigError: the address is wrong or taken, or a rank belongs to a group of another size.
        RankError: a rank has ended or did not connect in time.
    """
    parallel, world_size = config.parallel, config.parallel.world_size
    host, port = ("127.0.0.1", 0) if address is None else parse_address(address, "ranks")
    token = secrets.token_hex(16) if address is None else os.environ.get("FASTSERVE_TOKEN", "")
    try:
        listener = socket.create_server((host, port), backlog=world_size)
    except OSError as error:
        raise ConfigError(f"cannot wait for ranks at {host}:{port}: {error.strerror}; choose another address") from None
    with listener:
        if address is None:
            processes.start(world_size, listener.getsockname()[1], token, config.torch_threads)
        else:
            print(f"waiting for {world_size} ranks at {host}:{port}", file=sys.stderr, flush=True)
        peers: dict[int, Peer] = {}
        try:
            while len(peers) < world_size:
                processes.require_running(peers)
                if time.monotonic() > deadline:
                    missing = [rank for rank in range(world_size) if rank not in peers]
                    raise RankError(
                        f"rank {missing[0]} did not connect in time ({len(missing)} of {world_size} did not)"
                    )
                listener.settimeout(0.2)
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                peer = _greet(connection, token, config.timeout_s)
                if peer is None:
                    continue
                if peer.hello["world_size"] != world_size or peer.rank in peers or peer.rank not in range(world_size):
                    peer.channel.close()
                    raise ConfigError(
                        f"{peer} of {peer.hello['world_size']} connected, but this engine has {world_size} ranks "
                        f"({parallel.tensor_parallel_size} shards x {parallel.pipeline_parallel_size} stages), "
                        "each once; start as many"
                    )
                peers[peer.rank] = peer
        except BaseException:
            for peer in peers.values():
                peer.channel.close()
            raise
    return [peers[rank] for rank in range(world_size)]


def _greet(connection: socket.socket, token: str, silence_s: float) -> Peer | None:
    """The rank at the other end of the connection; None if it is no rank of this engine."""
    channel = Channel(connection, silence_s)
    deadline = time.monotonic() + _HELLO_S
    try:
        while time.monotonic() < deadline:
            for message in channel.receive():
                if message.kind == "hello" and secrets.compare_digest(message.fields["token"], token):
                    return Peer(int(message.fields["rank"]), channel, message.fields)
                raise ChannelClosed("not a rank of this engine")
    except (ChannelClosed, KeyError, TypeError, ValueError):
        pass
    channel.close()
    return None

"""The control channel: messages between the engine and a rank over one TCP connection.

A frame is two lengths, a JSON object and an array of 64-bit integers: an iteration is mostly block tables, which are
cheap as an array. Nothing received is ever executed.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
from array import array
from collections.abc import Iterable
from typing import Any, NamedTuple

from fastserve.core.errors import ConfigError

_LENGTHS = struct.Struct("<II")
_to_json = json.JSONEncoder(separators=(",", ":")).encode
_NUMBER_BYTES = 8
_MOST_BYTES = 1 << 28
"""Most bytes of a frame; a longer one is not from this program."""
_CHUNK_BYTES = 1 << 18


class ChannelClosed(ConnectionError):
    """The connection has ended, or the other side sends something that is no message."""


class Message(NamedTuple):
    """One message: its kind, and what it carries."""

    kind: str
    fields: dict[str, Any]
    numbers: list[int]


class Channel:
    """One end of a connection. Any thread may send; one thread at a time may receive.

    If the kernel hears nothing from the other machine for `silence_s` seconds, the connection fails, whether or not
    either process uses it.
    """

    def __init__(self, connection: socket.socket, silence_s: float) -> None:
        self._socket = connection
        self._sending = threading.Lock()
        self._buffer = bytearray()
        connection.settimeout(silence_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        probe_s = max(1, int(silence_s / 4))
        for option, value in (
            ("TCP_KEEPIDLE", probe_s),
            ("TCP_KEEPINTVL", probe_s),
            ("TCP_KEEPCNT", 3),
            ("TCP_USER_TIMEOUT", int(silence_s * 1000)),
        ):
            if hasattr(socket, option):  # Some systems lack them.
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def fileno(self) -> int:
        """The socket's file descriptor, for `select`."""
        return self._socket.fileno()

    def send(self, kind: str, numbers: Iterable[int] = (), **fields: Any) -> None:
        """Send a message; ChannelClosed if the connection has ended or the other side does not read."""
        self.send_frame(frame(kind, numbers, **fields))

    def send_frame(self, data: bytes) -> None:
        """Send a message that `frame` made."""
        try:
            with self._sending:
                self._socket.sendall(data)
        except OSError as error:
            raise ChannelClosed(f"{type(error).__name__}: {error}") from None

    def receive(self) -> list[Message]:
        """Wait for data; returns the messages that are complete, none if only a part has arrived.

        ChannelClosed if the connection has ended; complete messages are returned first.
        """
        try:
            data = self._socket.recv(_CHUNK_BYTES)
        except OSError as error:
            if isinstance(error, TimeoutError) and error.errno is None:  # Our own timeout, not the connection's.
                return []
            raise ChannelClosed(f"{type(error).__name__}: {error}") from None
        if not data:
            raise ChannelClosed("the connection was closed")
        self._buffer += data
        messages = []
        while (message := self._take()) is not None:
            messages.append(message)
        return messages

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _take(self) -> Message | None:
        """Remove and return the first complete message of the buffer; None if there is none."""
        buffer = self._buffer
        if len(buffer) < _LENGTHS.size:
            return None
        json_bytes, count = _LENGTHS.unpack_from(buffer)
        end = _LENGTHS.size + json_bytes + count * _NUMBER_BYTES
        if end > _MOST_BYTES:
            raise ChannelClosed(f"a frame of {end} bytes is no message")
        if len(buffer) < end:
            return None
        numbers = array("q")
        try:
            fields = json.loads(buffer[_LENGTHS.size : _LENGTHS.size + json_bytes].decode())
            kind = fields.pop("kind")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ChannelClosed(f"what was received is no message: {type(error).__name__}: {error}") from None
        numbers.frombytes(buffer[_LENGTHS.size + json_bytes : end])
        if sys.byteorder == "big":
            numbers.byteswap()
        del buffer[:end]
        return Message(kind, fields, numbers.tolist())


def frame(kind: str, numbers: Iterable[int] = (), **fields: Any) -> bytes:
    """The bytes of a message: made once, they can be sent to many ranks."""
    header = _to_json({"kind": kind, **fields}).encode()
    values = array("q", numbers)
    if sys.byteorder == "big":
        values.byteswap()
    return _LENGTHS.pack(len(header), len(values)) + header + values.tobytes()


def parse_address(text: str, what: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT"; ConfigError naming `what` for anything else."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{what} must be HOST:PORT, got {text!r}")
    return host.strip("[]"), int(port)

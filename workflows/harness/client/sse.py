"""Parser of server-sent events in a stream of bytes that may be cut anywhere."""

from __future__ import annotations

from typing import NamedTuple

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Event(NamedTuple):
    """One event: its kind, which may be empty, and its data."""

    kind: bytes
    data: bytes


class EventParser:
    """Collects events. Comments, events without data, and fields other than `event` and `data` are skipped.

    Lines end with \\n, \\r\\n or \\r, an empty line ends an event, and a byte order mark may begin the stream.
    """

    __slots__ = ("_after_cr", "_data", "_kind", "_rest", "_started")

    def __init__(self) -> None:
        self._rest = b""
        self._kind = b""
        self._data: list[bytes] = []
        self._after_cr = False
        self._started = False

    def feed(self, chunk: bytes) -> list[Event]:
        """Take a chunk; return the events that end in it; several data lines of one event are joined by \\n."""
        if not chunk:
            return []
        if not self._started:
            chunk = self._rest + chunk
            if len(chunk) < len(_BYTE_ORDER_MARK) and _BYTE_ORDER_MARK.startswith(chunk):
                self._rest = chunk
                return []
            self._started, self._rest = True, b""
            chunk = chunk.removeprefix(_BYTE_ORDER_MARK)
        # The other half of a \r\n may be in the next chunk; the line ends without it.
        if self._after_cr:
            chunk = chunk.removeprefix(b"\n")
        self._after_cr = chunk.endswith(b"\r")
        lines = (self._rest + chunk).splitlines(keepends=True)
        self._rest = b"" if not lines or lines[-1].endswith((b"\n", b"\r")) else lines.pop()
        events = []
        for line in lines:
            if (event := self._take(line.rstrip(b"\r\n"))) is not None:
                events.append(event)
        return events

    def end(self) -> list[Event]:
        """End the stream; return its last event if that has data but no empty line after it.

        The standard drops such an event, but some servers end their streams with `data: [DONE]` and no empty line.
        """
        rest, self._rest = self._rest, b""
        if rest:
            self._take(rest)
        event = self._take(b"")
        return [] if event is None else [event]

    def _take(self, line: bytes) -> Event | None:
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        elif line.startswith(b"event:"):
            self._kind = line[6:].removeprefix(b" ")
        elif not line and (self._data or self._kind):
            event = Event(self._kind, self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
            self._kind, self._data = b"", []
            return event if event.data else None
        return None

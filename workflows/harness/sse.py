"""Server-sent events out of a stream of bytes that may be cut anywhere."""

from __future__ import annotations


class EventParser:
    """Collects the `data` of events; other fields, comments and events without data are passed over.

    Lines end with \\n, \\r\\n or \\r, and an empty line ends an event.
    """

    __slots__ = ("_after_cr", "_data", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._after_cr = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of the events that end in this chunk; several lines of one event are joined by \\n."""
        if not chunk:
            return []
        # The other half of a \r\n may be in the next chunk; the line does not wait for it.
        if self._after_cr:
            chunk = chunk.removeprefix(b"\n")
        self._after_cr = chunk.endswith(b"\r")
        lines = (self._rest + chunk).splitlines(keepends=True)
        self._rest = b"" if not lines or lines[-1].endswith((b"\n", b"\r")) else lines.pop()
        events = []
        for line in lines:
            text = line.rstrip(b"\r\n")
            if text.startswith(b"data:"):
                self._data.append(text[5:].removeprefix(b" "))
            elif not text:
                if data := b"\n".join(self._data):
                    events.append(data)
                self._data = []
        return events

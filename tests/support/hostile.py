"""Bodies that cost a server much more than they cost their sender, and what one of them does to a server."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from support.servers import LONG_S, EventStream

MIB = 2**20
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


def repeated(before: bytes, piece: bytes, after: bytes, size: int) -> bytes:
    """As many pieces as fit into `size` bytes, between two others."""
    return before + piece * ((size - len(before) - len(after)) // len(piece)) + after


HEAD = b'{"max_tokens": 1, '
USER = b'"messages": [{"role": "user", "content": '
MESSAGE = b'{"role": "user", "content": "a"}'
PART = b'{"type": "text", "text": "a"}'
WORDS = b"a b "


def prompt_of(piece: bytes, last: bytes, size: int) -> bytes:
    """A list of prompts or ids."""
    return repeated(HEAD + b'"prompt": [', piece, last + b"]}", size)


def text_of(piece: bytes, size: int) -> bytes:
    """One long text as the prompt."""
    return repeated(HEAD + b'"prompt": "', piece, b'"}', size)


def field_of(before: bytes, piece: bytes, last: bytes, size: int) -> bytes:
    """A valid completion with another field."""
    return repeated(HEAD + b'"prompt": [5], ' + before, piece, last + b"}", size)


def chat_of(before: bytes, piece: bytes, after: bytes, size: int) -> bytes:
    """A conversation."""
    return repeated(HEAD + before, piece, after + b"}", size)


def named(head: bytes, form: bytes, size: int) -> bytes:
    """An object with many fields, each of another name."""
    return head + b",".join(form % i for i in range(size // 16)) + b"}"


HOSTILE: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "texts, the last a number": (TEXT, lambda size: prompt_of(b'"", ', b"1", size)),
    "texts, the first a number": (TEXT, lambda size: prompt_of(b'1, "", ', b'""', size)),
    "texts of one letter": (TEXT, lambda size: prompt_of(b'"a",', b'"a"', size)),
    "lists of one id": (TEXT, lambda size: prompt_of(b"[1],", b"[1]", size)),
    "lists of one id, the last a text": (TEXT, lambda size: prompt_of(b"[1],", b'"a"', size)),
    "empty lists": (TEXT, lambda size: prompt_of(b"[],", b"[]", size)),
    "lists of lists": (TEXT, lambda size: prompt_of(b"[[[[]]]],", b"[]", size)),
    "empty objects": (TEXT, lambda size: prompt_of(b"{},", b"{}", size)),
    "objects": (TEXT, lambda size: prompt_of(b'{"a":1},', b"{}", size)),
    "ids": (TEXT, lambda size: prompt_of(b"5,", b"5", size)),
    "ids, the last a text": (TEXT, lambda size: prompt_of(b"1,", b'"a"', size)),
    "ids that are too small": (TEXT, lambda size: prompt_of(b"-1,", b"-1", size)),
    "ids that are too large": (TEXT, lambda size: prompt_of(b"9" * 99 + b",", b"1", size)),
    "fractions": (TEXT, lambda size: prompt_of(b"0.12345678901234567,", b"1.5", size)),
    "exponents": (TEXT, lambda size: prompt_of(b"1e308,", b"1e999", size)),
    "constants": (TEXT, lambda size: prompt_of(b"NaN,", b"-Infinity", size)),
    "true and false": (TEXT, lambda size: prompt_of(b"true,false,null,", b"true", size)),
    "a long number": (TEXT, lambda size: prompt_of(b"9", b"9", size)),
    "a long fraction": (TEXT, lambda size: field_of(b'"top_p": 0.', b"9", b"", size)),
    "long numbers": (TEXT, lambda size: prompt_of(b"9" * 4300 + b",", b"9", size)),
    "depth of lists": (TEXT, lambda size: b"[" * size),
    "depth of objects": (TEXT, lambda size: b'{"a":' * (size // 5)),
    "a deep field": (TEXT, lambda size: field_of(b'"response_format": ', b"[" * 800 + b"]" * 800, b"", 1700)),
    "a deep field of no meaning": (TEXT, lambda size: field_of(b'"x": ', b"[" * 800 + b"]" * 800, b"", 1700)),
    "messages": (CHAT, lambda size: chat_of(b'"messages": [', MESSAGE + b",", MESSAGE + b"]", size)),
    "messages, the last wrong": (CHAT, lambda size: chat_of(b'"messages": [', MESSAGE + b",", b"5]", size)),
    "empty messages": (CHAT, lambda size: chat_of(b'"messages": [', b"{},", b"{}]", size)),
    "parts": (CHAT, lambda size: chat_of(USER + b"[", PART + b",", PART + b"]}]", size)),
    "parts, the last wrong": (CHAT, lambda size: chat_of(USER + b"[", PART + b",", b"5]}]", size)),
    "a long message": (CHAT, lambda size: chat_of(USER + b'"', WORDS, b'"}]', size)),
    "a long role": (CHAT, lambda size: chat_of(b'"messages": [{"role": "', b"a", b'"}]', size)),
    "tool calls": (CHAT, lambda size: chat_of(USER + b'"a", "tool_calls": [', b"{},", b"{}]}]", size)),
    "tools": (CHAT, lambda size: chat_of(USER + b'"a"}], "tools": [', b"{},", b"{}]", size)),
    "stop texts": (TEXT, lambda size: field_of(b'"stop": [', b'"a",', b'"b"]', size)),
    "a long stop text": (TEXT, lambda size: field_of(b'"stop": "', b"a", b'"', size)),
    "stop ids": (TEXT, lambda size: field_of(b'"stop_token_ids": [', b"1,", b"1]", size)),
    "biases": (TEXT, lambda size: named(HEAD + b'"prompt": [5], "logit_bias": {', b'"%d":1', size) + b"}"),
    "biases of none": (TEXT, lambda size: named(HEAD + b'"prompt": [5], "logit_bias": {', b'"x%d":""', size) + b"}"),
    "allowed ids": (TEXT, lambda size: field_of(b'"allowed_token_ids": [', b"5,", b"5]", size)),
    "choices": (TEXT, lambda size: field_of(b'"n": 128, "x": [', b"1,", b"1]", size)),
    "choices of several prompts": (
        TEXT,
        lambda size: repeated(HEAD + b'"n": 128, "prompt": [[5],[5],[5],[5],[5],[5],[5],[', b"5,", b"5]]}", size // 8),
    ),
    "choices of a long prompt": (
        TEXT,
        lambda size: repeated(HEAD + b'"n": 128, "prompt": [', b"5,", b"5]}", size // 17),
    ),
    "an echo of ids": (TEXT, lambda size: repeated(HEAD + b'"echo": true, "prompt": [', b"5,", b"5]}", size)),
    "bad words": (TEXT, lambda size: field_of(b'"bad_words": [', b'"a",', b'"a"]', size)),
    "a field of no meaning": (TEXT, lambda size: field_of(b'"x": [', b"[1,2],", b"1]", size)),
    "many fields": (TEXT, lambda size: named(HEAD + b'"prompt": [5], ', b'"%x":1', size)),
    "the same field": (TEXT, lambda size: field_of(b"", b'"a":1,', b'"a":1', size)),
    "a model's name": (TEXT, lambda size: field_of(b'"model": "', b"a", b'"', size)),
    "a regular expression": (TEXT, lambda size: field_of(b'"guided_regex": "', b"(a*)*", b'"', size)),
    "spaces": (TEXT, lambda size: b" " * size),
    "spaces around an object": (TEXT, lambda size: text_of(b"a", 40) + b" " * (size - 40)),
    "bytes that are no text": (TEXT, lambda size: HEAD + b'"prompt": "' + b"\xff" * (size - 40)),
    "zeros": (TEXT, lambda size: b"\0" * size),
    "quotes": (TEXT, lambda size: b'"' * size),
    "backslashes": (TEXT, lambda size: field_of(b'"x": "', rb"\\", b'"', size)),
    "half a text": (TEXT, lambda size: text_of(b"a", size)[:-2]),
    "text: words": (TEXT, lambda size: text_of(WORDS, size)),
    "text: one word": (TEXT, lambda size: text_of(b"a", size)),
    "text: spaces": (TEXT, lambda size: text_of(b" ", size)),
    "text: brackets": (TEXT, lambda size: text_of(rb"[{\"a\": 1}, ", size)),
    "text: escapes": (TEXT, lambda size: text_of(rb"\n", size)),
    "text: characters by number": (TEXT, lambda size: text_of(rb"\u6771", size)),
    "text: characters of four bytes": (TEXT, lambda size: text_of("\N{GRINNING FACE}".encode(), size)),
    "text: one of them": (TEXT, lambda size: text_of(b"a", size - 4)[:-2] + "\N{GRINNING FACE}".encode() + b'"}'),
    "text: special tokens": (TEXT, lambda size: text_of(b"</s>", size)),
    "tokenize: words": ("/tokenize", lambda size: text_of(WORDS, size - 28)[:-1] + b', "return_token_strs": true}'),
    "tokenize: messages": ("/tokenize", lambda size: chat_of(b'"messages": [', MESSAGE + b",", MESSAGE + b"]", size)),
    "detokenize: ids": ("/detokenize", lambda size: repeated(b'{"tokens": [', b"5,", b"5]}", size)),
    "detokenize: halves of characters": ("/detokenize", lambda size: repeated(b'{"tokens": [', b"130,", b"5]}", size)),
    "long texts": (TEXT, lambda size: prompt_of(b'"' + WORDS * 4096 + b'",', b'"a"', size)),
}  # fmt: skip
"""Each with the path it goes to and what makes a body of at most some size."""


_LINE = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
_CHUNKED = _LINE + b"transfer-encoding: chunked\r\n\r\n"
HEADS: dict[str, Callable[[int], bytes]] = {
    "a header's value": lambda size: repeated(_LINE + b"x: ", b"a", b"\r\n\r\n", size),
    "a header's name": lambda size: repeated(_LINE, b"a", b": x\r\n\r\n", size),
    "headers": lambda size: repeated(_LINE, b"a: b\r\n", b"\r\n", size),
    "a URL": lambda size: repeated(b"POST /", b"a", b" HTTP/1.1\r\nhost: localhost\r\n\r\n", size),
    "headers after the body": lambda size: repeated(_CHUNKED + b"2\r\n{}\r\n0\r\n", b"a: b\r\n", b"\r\n", size),
}
"""Requests that are large beside their bodies."""


class Cost(NamedTuple):
    """What a request did to others."""

    status: int
    answer: bytes
    gap_s: float
    """Longest time without a token of a stream that was under way."""
    num_bytes: int
    """What the process took in memory at the most, more than before the first request."""


class Watched:
    """A server in another process, with a stream of a token every few milliseconds under way."""

    def __init__(self, port: int, pid: int, stream: EventStream) -> None:
        self._port = port
        self._process = Path(f"/proc/{pid}")
        self._stream = stream
        self._idle = self._memory("VmRSS")
        self._arrived: list[float] = []
        self._ended = False
        self._reading = threading.Thread(target=self._read, name="stream")
        self._reading.start()
        self._wait_for_token(time.perf_counter())

    def _read(self) -> None:
        for _ in self._stream:
            self._arrived.append(time.perf_counter())
            if self._ended:
                return

    def close(self) -> None:
        """End the stream."""
        self._ended = True
        self._reading.join(LONG_S)
        self._stream.close()

    def cost(self, request: Iterable[bytes]) -> Cost:
        """Send a request, as it is on the wire, and wait for its answer and the token after that."""
        start = self.start_measuring()
        status, answer = exchange(self._port, request)
        return Cost(status, answer, self.longest_gap_s(start), self.num_bytes())

    def start_measuring(self) -> float:
        """The time; what the process takes at the most is measured from here on."""
        (self._process / "clear_refs").write_text("5")
        return time.perf_counter()

    def num_bytes(self) -> int:
        """What the process took in memory at the most, more than before the first request."""
        return self._memory("VmHWM") - self._idle

    def longest_gap_s(self, start: float) -> float:
        """Longest time between two tokens, from the last one before `start` to the next one from now."""
        self._wait_for_token(time.perf_counter())
        arrived = list(self._arrived)
        first = max(0, bisect_left(arrived, start) - 1)
        return max(later - earlier for earlier, later in pairwise(arrived[first:]))

    def _wait_for_token(self, start: float) -> None:
        while not self._arrived or self._arrived[-1] < start:
            assert self._reading.is_alive(), "the stream has ended"
            assert time.perf_counter() < start + LONG_S, "the stream stands still"
            time.sleep(0.001)

    def _memory(self, name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", (self._process / "status").read_text())
        assert found is not None
        return 1024 * int(found[1])


@contextmanager
def watched(port: int, pid: int) -> Iterator[Watched]:
    """A stream of tokens is under way while it lasts."""
    one = Watched(port, pid, EventStream(port, TEXT, {"prompt": [1], "max_tokens": 60_000, "stream": True}))
    try:
        yield one
    finally:
        one.close()


def post(path: str, body: bytes, *more: str, length: int | None = None) -> bytes:
    """A request, on the wire; `length`: what it says of the body's."""
    head = [
        f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", "connection: close",
        f"content-length: {len(body) if length is None else length}", *more,
    ]  # fmt: skip
    return "\r\n".join([*head, "", ""]).encode() + body


def post_chunks(path: str, body: bytes, chunk: int) -> bytes:
    """A request whose body comes in chunks of so many bytes."""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    pieces = (body[start : start + chunk] for start in range(0, len(body), chunk))
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return head.encode() + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


def exchange(port: int, request: Iterable[bytes]) -> tuple[int, bytes]:
    """Status and body of the answer. Reads while it sends, as a server may answer before it has all."""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=LONG_S)) as connection:

        def send() -> None:
            with suppress(OSError):  # The server has answered and gone.
                for piece in request:
                    connection.sendall(piece)

        sending = threading.Thread(target=send, name="send")
        sending.start()
        received = b""
        while not _is_whole(received) and (data := connection.recv(65_536)):
            received += data
    sending.join(LONG_S)
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split(maxsplit=2)[1]), body


def _is_whole(received: bytes) -> bool:
    head, separator, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    return bool(separator) and length is not None and len(body) >= int(length[1])


def message_of(answer: bytes) -> str:
    """What an error says."""
    message: str = json.loads(answer)["error"]["message"]
    return message

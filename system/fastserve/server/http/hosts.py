"""The Host header, checked against DNS rebinding.

A page of evil.example may let its name resolve to 127.0.0.1. For a browser the server is then part of the page's own
site, and the page can read its answers. The browser still sends `Host: evil.example`, so that name is refused. IP
addresses are accepted, since the attack needs a name.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from fastserve.server.http.errors import error_body, json_response

_LOOPBACK = ("localhost", "*.localhost")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def names_for(host: str) -> tuple[str, ...]:
    """Return the names allowed by default for a server that listens at `host`.

    Beyond loopback every name is allowed, since the server cannot know its names in a network.
    """
    return (*_LOOPBACK, host) if is_loopback(host) else ("*",)


class AllowedHosts:
    """Answers 403 unless the Host header is missing or has an allowed name or an IP address."""

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        """`names`: exact names, `*.example.com` for all names below example.com, `*` for every name."""
        self._app = app
        self._names = frozenset(name.lower() for name in names)
        self._suffixes = tuple(name.lower()[1:] for name in names if name.startswith("*."))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run as an ASGI application."""
        app = self._app
        if scope["type"] == "http" and "*" not in self._names:
            given = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
            if given and not self._allows(name := _name_of(given)):
                message = f"this server is not known as {name!r} (Host header); start it with --allowed-hosts {name}"
                app = json_response(error_body(403, message, code="host_not_allowed"), 403)
        await app(scope, receive, send)

    def _allows(self, name: str) -> bool:
        return name in self._names or name.endswith(self._suffixes) or _is_address(name)


def _name_of(header: str) -> str:
    """Return the header without its port and without the brackets of an IPv6 address."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].rstrip(".").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

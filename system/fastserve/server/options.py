"""How the server behaves, whatever it serves."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fastserve.core.checks import require_int, require_positive
from fastserve.core.errors import ConfigError
from fastserve.server.http.log import LOG_LEVELS

_MOST_PORT = 65_535


@dataclass(frozen=True)
class ServerOptions:
    """Options of `fastserve serve` that hold for any model. ConfigError for a value out of range."""

    host: str = "127.0.0.1"
    """Address to listen at."""
    port: int = 8000
    """0 for any free one."""
    api_key: str | None = None
    """What /v1, /tokenize, /detokenize and the live page's data ask for; None: nothing."""
    max_requests: int = 10_000
    """Unfinished requests to hold; those beyond are answered 429."""
    page: bool = True
    """Whether there is a live page."""
    drain_timeout_s: float = 30.0
    """Seconds to finish the requests in progress after the server is told to stop."""
    stall_timeout_s: float = 60.0
    """Seconds without the end of an iteration, while requests wait, after which the engine counts as stalled."""
    receive_timeout_s: float = 60.0
    """Seconds for a request's head and body to arrive; later ones are answered 408 and disconnected."""
    allowed_hosts: tuple[str, ...] | None = None
    """Names that the Host header may have, `*.example.com` for all below one, `*` for any. IP addresses always may.
    None: on a loopback address `localhost`, `*.localhost` and `host`; on any other address every name."""
    allowed_origins: tuple[str, ...] = ()
    """Origins whose pages may use the server from a browser (CORS); `*` for any."""
    root_path: str = ""
    """Path below which a proxy offers the server, such as /llm."""
    ssl_certfile: Path | None = None
    """Certificate chain in PEM format; with it the server speaks HTTPS only."""
    ssl_keyfile: Path | None = None
    """Its private key in PEM format, not encrypted. None: the key is in `ssl_certfile`."""
    timeline: Path | None = None
    """File to write a trace of all requests to when the server ends; until then it is kept in memory."""
    log_level: str = "warning"
    """error, warning, info (a line for each request) or debug."""

    def __post_init__(self) -> None:
        require_int("max_requests", self.max_requests, 1)
        for name in ("drain_timeout_s", "stall_timeout_s", "receive_timeout_s"):
            require_positive(name, getattr(self, name))
        if not 0 <= self.port <= _MOST_PORT:
            raise ConfigError(f"port must be from 0 to {_MOST_PORT}, got {self.port}")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(f"log_level must be one of {', '.join(LOG_LEVELS)}, got {self.log_level!r}")
        for origin in self.allowed_origins:
            scheme, separator, rest = origin.partition("://")
            if origin not in ("*", "null") and not (scheme and separator and rest and "/" not in rest):
                raise ConfigError(
                    f"allowed_origins: {origin!r} is no origin; give scheme, host and port, such as "
                    "https://example.com or http://localhost:3000, without a path, or *"
                )
        for host in self.allowed_hosts or ():
            if "/" in host or "*" in host.removeprefix("*.").removeprefix("*") or ":" in host:
                raise ConfigError(
                    f"allowed_hosts: {host!r} is no name; give one such as llm.example.com, *.example.com, or *"
                )
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"root_path must begin with / and not end with one, such as /llm, got {self.root_path!r}")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError(f"ssl_keyfile={self.ssl_keyfile} needs ssl_certfile, the certificate of that key")


def names_of(values: Iterable[str]) -> tuple[str, ...]:
    """Names from option values, each of which is one name, several with commas between, or a JSON list."""
    names: list[str] = []
    for value in values:
        if value.lstrip().startswith("["):
            try:
                listed = json.loads(value)
            except ValueError as error:
                raise ConfigError(f"{value!r} is no JSON list: {error}") from error
            if not all(isinstance(name, str) for name in listed):
                raise ConfigError(f"{value!r} must be a JSON list of texts")
            names += listed
        else:
            names += [name.strip() for name in value.split(",")]
    return tuple(dict.fromkeys(name for name in names if name))

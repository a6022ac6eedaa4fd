"""How the server behaves, whatever it serves."""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.config import require_int, require_positive


@dataclass(frozen=True)
class ServerOptions:
    """How the server behaves, whatever it serves."""

    api_key: str | None = None
    """What /v1 and the live page's data ask for; None: nothing."""
    max_requests: int = 10_000
    """Unfinished requests it holds; those beyond are answered 429."""
    page: bool = True
    """Whether there is a live page."""
    drain_timeout_s: float = 30.0
    """How long it finishes what it has begun when it is told to stop."""

    def __post_init__(self) -> None:
        require_int("max_requests", self.max_requests, 1)
        require_positive("drain_timeout_s", self.drain_timeout_s)

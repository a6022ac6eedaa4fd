"""FastServe: an LLM serving engine with preemptive scheduling, run by simulated and real executors alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastserve.core import compiled

compiled.use()  # Before any module is imported that may be compiled.

from fastserve.core.errors import FastServeError  # noqa: E402
from fastserve.core.request import Request, RequestStatus, SamplingParams  # noqa: E402

if TYPE_CHECKING:
    from fastserve.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "FastServeError", "Request", "RequestStatus", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `LLM`, and torch with it, only when asked for: simulations must start without torch."""
    if name == "LLM":
        from fastserve.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

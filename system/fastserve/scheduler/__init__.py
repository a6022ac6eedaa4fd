"""Which requests run next: the interface, what all policies share, and how policies are named."""

from fastserve.scheduler.base import NoOptions, Scheduler
from fastserve.scheduler.iteration import Drop, Iteration
from fastserve.scheduler.registry import register
from fastserve.scheduler.swapping import MemoryOptions, PreemptiveOptions, SwapMode

__all__ = [
    "Drop",
    "Iteration",
    "MemoryOptions",
    "NoOptions",
    "PreemptiveOptions",
    "Scheduler",
    "SwapMode",
    "register",
]

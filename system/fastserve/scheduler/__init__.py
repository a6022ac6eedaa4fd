"""Which requests run next: the interface, what all policies share, and FastServe's own policies."""

from fastserve.scheduler.base import NoOptions, Scheduler
from fastserve.scheduler.iteration import Drop, Iteration
from fastserve.scheduler.registry import file_name, find_policy, list_policies, make_scheduler, register
from fastserve.scheduler.swapping import MemoryOptions, PreemptiveOptions, SwapMode

__all__ = [
    "Drop",
    "Iteration",
    "MemoryOptions",
    "NoOptions",
    "PreemptiveOptions",
    "Scheduler",
    "SwapMode",
    "file_name",
    "find_policy",
    "list_policies",
    "make_scheduler",
    "register",
]

"""Which requests run next: what the author of a policy needs (`Policy`), and what the engine talks to (`Scheduler`)."""

from fastserve.scheduler.batch import Batch, Outcome, Terms
from fastserve.scheduler.iteration import Drop, Iteration, Reuse
from fastserve.scheduler.need import NeedOrder
from fastserve.scheduler.options import MemoryOptions, PolicyOptions, PreemptiveOptions, SwapMode
from fastserve.scheduler.policy import Policy
from fastserve.scheduler.registry import register
from fastserve.scheduler.scheduler import Scheduler

__all__ = [
    "Batch",
    "Drop",
    "Iteration",
    "MemoryOptions",
    "NeedOrder",
    "Outcome",
    "Policy",
    "PolicyOptions",
    "PreemptiveOptions",
    "Reuse",
    "Scheduler",
    "SwapMode",
    "Terms",
    "register",
]

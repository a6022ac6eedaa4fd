"""How caches move: one class for each swap mode, chosen once, when the scheduler is made."""

from fastserve.scheduler.moving.ahead import MoveAhead
from fastserve.scheduler.moving.base import CacheMover
from fastserve.scheduler.moving.never import MoveNever
from fastserve.scheduler.moving.on_demand import DropOnDemand, SwapOnDemand

__all__ = ["CacheMover", "DropOnDemand", "MoveAhead", "MoveNever", "SwapOnDemand"]

"""RankGroup and its parts: the ranks of a distributed engine, as the engine sees them."""

from fastserve.runtime.executors.ranks.group import RankGroup

__all__ = ["RankGroup"]

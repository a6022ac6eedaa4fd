"""Options of policies: what happens when caches do not all fit the GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastserve.core.checks import require_int, require_positive
from fastserve.core.errors import ConfigError

SwapMode = Literal["proactive", "reactive", "recompute", "none"]
"""How caches move.

`proactive`: to and from host memory beside the computation, ahead of need; the batch runs without swapped-out requests.
`reactive`: when the room or the cache is needed; the batch waits for the transfer.
`recompute`: never; when room is needed, the cache of the last request in order is dropped.
`none`: never; a request that finds no room waits. Caches are dropped only if nothing else can run.
"""

Reserve = Literal["history", "batch", "none"]


@dataclass(frozen=True)
class PolicyOptions:
    """Options of a policy. This class has none; a policy adds fields in a subclass, and checks in `__post_init__`."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of range; subclasses call `super().__post_init__()`."""

    @property
    def simulation_only_reason(self) -> str:
        """Why only a simulation can run the policy with these options, for people; empty: a real engine can too."""
        return ""


@dataclass(frozen=True)
class MemoryOptions(PolicyOptions):
    """Options of a policy that may take a request's cache off the GPU."""

    swap: SwapMode = "reactive"
    swap_budget_blocks: int = 64
    """Proactive: no transfer starts while this many blocks are in transfer in its direction."""
    reserve: Reserve = "history"
    """Proactive: blocks kept idle for arrivals. As many as the prompts of the last `reserve_window_s` took and one
    for each place in the batch (history), or those for the batch only (batch), or none."""
    reserve_window_s: float = 1.0
    """Proactive: length of the history of arrivals, in seconds."""
    reserve_limit: float = 0.125
    """Proactive: the largest share of the GPU's blocks that the reserve takes, so that a small cache is not emptied."""

    stay_tokens: int = 8
    """Proactive: tokens that a request computes after its swap-in before it may lose its place in the batch to another.
    A cache in transfer takes its room for two iterations: much, where a batch fills memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("stay_tokens", self.stay_tokens, 0)
        require_int("swap_budget_blocks", self.swap_budget_blocks, 1)
        require_positive("reserve_window_s", self.reserve_window_s)
        if not 0 <= self.reserve_limit <= 1:
            raise ConfigError(f"reserve_limit must be a share from 0 to 1, got {self.reserve_limit!r}")

    def most_reserved(self, num_gpu_blocks: int) -> int:
        """The largest reserve in blocks, of a pool of `num_gpu_blocks`; 0 unless `swap` is proactive."""
        if self.swap != "proactive" or self.reserve == "none":
            return 0
        return int(self.reserve_limit * num_gpu_blocks)


@dataclass(frozen=True)
class PreemptiveOptions(MemoryOptions):
    """Options of a policy that preempts to follow its order, on FastServe's engine and with its swapping."""

    swap: SwapMode = "proactive"

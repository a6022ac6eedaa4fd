"""Options of the skip-join multi-level feedback queue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastserve.core.checks import require_int, require_positive
from fastserve.core.errors import ConfigError
from fastserve.scheduler import PreemptiveOptions


@dataclass(frozen=True)
class SkipJoinMLFQOptions(PreemptiveOptions):
    """What the paper sets, and what it leaves open."""

    quantum_base_s: float | None = None
    """Quantum of the highest queue in seconds; none takes the shortest iteration (one decode step of one request)."""
    quantum_ratio: float = 2.0
    """Quantum of each queue over that of the queue above it."""
    num_levels: int = 16
    """Queues. The paper states no number; 16 reach 32,768 base quanta, so the last one never binds."""
    alpha_s: float | None = 0.3
    """A request that has waited this many seconds goes to the highest queue; none never promotes."""
    starvation_check_every: int = 1
    """Decisions from one check for requests that have waited `alpha_s` to the next. The paper states no period."""
    insertion: Literal["back", "front"] = "back"
    """Where in its new queue a demoted request goes. The paper does not say; the back is fair among equals."""
    promotion_resets_quantum: bool = True
    """Whether a promoted request starts a new quantum, or keeps what it has used since it last changed queues."""
    enst_ties: Literal["front", "back"] = "front"
    """Which request of a queue, where T_execute is the same for all, counts as scheduled next. The paper does not say;
    the batch is taken from the front."""
    max_passed_over: int = 16
    """Prompts beyond the token budget that a decision passes over before it tries no more of them; bounds its cost."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantum_base_s is not None:
            require_positive("quantum_base_s", self.quantum_base_s)
        if self.alpha_s is not None:
            require_positive("alpha_s", self.alpha_s)
        require_int("num_levels", self.num_levels, 1)
        require_int("starvation_check_every", self.starvation_check_every, 1)
        require_int("max_passed_over", self.max_passed_over, 0)
        require_positive("quantum_ratio", self.quantum_ratio)
        if self.quantum_ratio <= 1:
            raise ConfigError(f"quantum_ratio must be above 1, got {self.quantum_ratio!r}")

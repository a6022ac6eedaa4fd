"""Options of the gittins policy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastserve.core.checks import require_int, require_positive
from fastserve.core.errors import ConfigError
from fastserve.scheduler import PreemptiveOptions


@dataclass(frozen=True)
class GittinsOptions(PreemptiveOptions):
    """What to minimize, and how the past counts."""

    objective: Literal["slowdown", "jct"] = "slowdown"
    """Cost of a request: its completion time over its output length (slowdown), or its completion time (jct)."""
    exponent: float | None = None
    """p in mean(cost ** p). 1 is the plain mean; a larger p favours requests that wait longest. None takes 3 for
    slowdown and 1 for jct."""
    alpha_s: float | None = 0.3
    """Requests that have waited this many seconds come first, as long as all of them fit one batch; none: never."""
    memory_requests: float = 1000.0
    """Finished requests after which an old one counts 1/e: enough to know a distribution and to follow its changes."""
    switching_cost: float = 1.0
    """Share of the measured time of a swap that counts against a swapped-out request; 0 makes swapping free."""
    prices_memory: bool = False
    """Whether a token is priced by the scarcer of what it takes: its place in the batch, or its context's part of the
    cache. Otherwise by its place."""
    max_passed_over: int = 16
    """Prompts beyond the token budget that a decision passes over before it tries no more of them; bounds its cost."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha_s is not None:
            require_positive("alpha_s", self.alpha_s)
        require_positive("memory_requests", self.memory_requests)
        require_int("max_passed_over", self.max_passed_over, 0)
        # Beyond, the longest answers would weigh less than the smallest number there is.
        if self.exponent is not None and not 1 <= self.exponent <= 10:
            raise ConfigError(f"exponent must be from 1 to 10, got {self.exponent!r}")
        if not 0 <= self.switching_cost < math.inf:
            raise ConfigError(f"switching_cost must be a finite number of at least 0, got {self.switching_cost!r}")

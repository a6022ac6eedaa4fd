"""An engine's own time: what an iteration costs beside the kernels that a profile's stage prices."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from fastserve.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EngineTime:
    """Seconds of an engine's host between kernels: scheduling, launches, sampling, output.

    It is added to an iteration of the first stage, which the host drives.
    """

    per_iteration_s: float = 0.0
    per_request_s: float = 0.0
    """For each request of the iteration, prompts and decodes."""
    per_token_s: float = 0.0
    """For each token that the iteration computes."""
    per_transfer_s: float = 0.0
    """For each cache that starts to move in or out with the iteration."""
    source: Literal["none", "fitted", "measured"] = "none"
    """Where the numbers come from; none: the profile has no such time, or its stage contains it."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "source" and not 0 <= value < math.inf:
                raise ConfigError(f"engine_time.{field.name} must be seconds of at least 0, got {value!r}")
        if self.source not in ("none", "fitted", "measured"):
            raise ConfigError(f"engine_time.source must be none, fitted or measured, got {self.source!r}")

    @property
    def is_zero(self) -> bool:
        """Whether it adds nothing."""
        return not (self.per_iteration_s or self.per_request_s or self.per_token_s or self.per_transfer_s)


NO_ENGINE_TIME = EngineTime()

"""What `fastserve profile` can be told. No torch: the command's help imports this."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from fastserve.core.checks import Integer, require_int
from fastserve.core.config import EngineOptions, ModelSource, Processes
from fastserve.core.errors import ConfigError
from fastserve.core.options import check_options, described, flag_of, option, option_of
from fastserve.core.parallel import ParallelConfig

TIMED_BLOCKS = 64
"""Most blocks of a timed transfer, and so the host pool's default size."""


@dataclass(frozen=True)
class ProfileConfig:
    """What to measure of which model. ConfigError for a value out of range."""

    source: ModelSource
    engine: EngineOptions = field(default_factory=EngineOptions)
    """The largest batch, the budget and the pools to measure. None: a pool on the device with room for a full batch of
    full contexts, if memory allows, and a host pool to time transfers."""
    repeats: int = option(3, "Times each point is measured; the median counts.", Integer(1))
    dense: bool | None = option(
        None, "Follow a GPU's steps, with many points, or fit lines to few points.", show_default="dense on a GPU"
    )
    quick: bool = option(False, "Measure fewer points.", flag="--quick")
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    ranks: str | None = option_of(Processes, "ranks")

    def require_none_of_measuring(self) -> None:
        """Raise ConfigError for an option that has no meaning where kernel tables give the times."""
        plain = ProfileConfig(ModelSource(model=self.source.model), parallel=self.parallel)
        for given, default in ((self.source, plain.source), (self.engine, plain.engine), (self, plain)):
            for each in fields(given):
                known = described(each)
                if known is not None and getattr(given, each.name) != getattr(default, each.name):
                    raise ConfigError(
                        f"{flag_of(each.name, known)} has no meaning with --kernels, which measures nothing; "
                        "leave it out"
                    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.engine.num_host_blocks is not None:
            require_int("num_host_blocks", self.engine.num_host_blocks, 1)

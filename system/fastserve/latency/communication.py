"""Links by latency and bandwidth: to host memory, between two stages, and among the shards of a stage.

Every message takes `latency + bytes / bandwidth`; `fit_link` finds both from measured messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastserve.core.checks import require_int, require_positive
from fastserve.core.errors import ConfigError

_HIDDEN_RISE = 0.01
"""Of the time of the largest message, where messages of several sizes take as long."""


@dataclass(frozen=True, slots=True)
class HostLink:
    """The link between GPU and host memory, the same in each direction."""

    bandwidth_bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        _require_link("host_link", self.latency_s, self.bandwidth_bytes_per_s)

    def transfer_time(self, num_bytes: int) -> float:
        """Seconds one transfer occupies its direction of the link."""
        return self.latency_s + num_bytes / self.bandwidth_bytes_per_s


@dataclass(frozen=True, slots=True)
class StageLink:
    """The link over which a pipeline stage sends its activations to the next."""

    latency_s: float
    bandwidth_bytes_per_s: float
    bytes_per_token: int
    """Activations of one token that cross this link."""
    rendezvous: bool = False
    """Whether activations move only once the next stage is free to take them, and keep it busy meanwhile, as over gloo;
    otherwise they move beside what it computes."""

    def __post_init__(self) -> None:
        _require_link("stage_link", self.latency_s, self.bandwidth_bytes_per_s)
        require_int("stage_link.bytes_per_token", self.bytes_per_token, 1)
        if not isinstance(self.rendezvous, bool):
            raise ConfigError(f"stage_link.rendezvous must be true or false, got {self.rendezvous!r}")

    def transfer_time(self, num_tokens: int) -> float:
        """Seconds to send the activations of an iteration that computes this many tokens."""
        return self.latency_s + num_tokens * self.bytes_per_token / self.bandwidth_bytes_per_s


@dataclass(frozen=True, slots=True)
class AllReduce:
    """The sums of activations over the shards of a stage, during which nothing is computed.

    The last stage also gathers the best of each shard's vocabulary, two numbers a request: priced as one latency.
    """

    latency_s: float
    bandwidth_bytes_per_s: float
    """Bytes of the message, of which every shard has one, by the time it takes until all have the sum."""
    bytes_per_token: int
    """Activations of one token."""
    per_stage: tuple[int, ...]
    """All-reduces of an iteration in each stage, from the first."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "per_stage", tuple(self.per_stage))
        _require_link("all_reduce", self.latency_s, self.bandwidth_bytes_per_s)
        require_int("all_reduce.bytes_per_token", self.bytes_per_token, 1)
        if not self.per_stage:
            raise ConfigError("all_reduce.per_stage must have a number for each stage, got none")
        for stage, count in enumerate(self.per_stage):
            require_int(f"all_reduce.per_stage[{stage}]", count, 1)

    def of_stage(self, stage: int) -> tuple[float, float]:
        """Seconds in an iteration of that stage, and seconds more for each of its tokens."""
        count = self.per_stage[stage]
        messages = count + (stage == len(self.per_stage) - 1)
        return messages * self.latency_s, count * self.bytes_per_token / self.bandwidth_bytes_per_s


def all_reduces(stage_layers: Sequence[int]) -> tuple[int, ...]:
    """All-reduces of an iteration in each stage: two a layer, and one for the embedding, which the first stage has."""
    return tuple(2 * layers + (stage == 0) for stage, layers in enumerate(stage_layers))


def fit_link(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Latency in seconds and bandwidth in bytes/s of messages measured as (bytes, seconds).

    Least squares on relative errors of `latency + bytes / bandwidth`, neither negative. From one size nothing is known
    of the latency: all of its time is bandwidth. Where more bytes take no longer, all is latency, and the bandwidth
    such that the largest message takes 1 % more, which noise can hide. ConfigError without points, or for one that is
    not above 0.
    """
    from scipy.optimize import nnls

    if not points:
        raise ConfigError("no message was measured: a link needs one (bytes, seconds) at least, better several sizes")
    for num_bytes, seconds in points:
        require_positive("bytes of a measured message", num_bytes)
        require_positive("seconds of a measured message", seconds)
    sizes, times = np.array(points, dtype=float).T
    if (sizes == sizes[0]).all():
        return 0.0, float(1 / np.median(times / sizes))
    rows = np.stack([1.0 / times, sizes / times], axis=1)
    scale = rows.max(axis=0)
    latency_s, per_byte = nnls(rows / scale, np.ones(len(rows)))[0] / scale
    if not per_byte:
        per_byte = _HIDDEN_RISE * latency_s / sizes.max()
    return float(latency_s), float(1 / per_byte)


def _require_link(name: str, latency_s: float, bandwidth_bytes_per_s: float) -> None:
    if not 0 <= latency_s < float("inf"):
        raise ConfigError(f"{name}.latency_s must be a finite number of at least 0, got {latency_s!r}")
    require_positive(f"{name}.bandwidth_bytes_per_s", bandwidth_bytes_per_s)

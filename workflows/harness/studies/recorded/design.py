"""The design of a recording: what is varied, and the command-line options that say so."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fastserve.core.checks import require_int, require_positive
from fastserve.core.errors import ConfigError

DEVICE_SHARE = {"cpu": 0.1, "cuda": 0.85}
"""Share of the device memory left beside the weights that the pool of memory "all" takes; computing needs the rest."""
HOST_SHARE = 0.5
"""Share of the free host memory that the host pool takes."""


@dataclass(frozen=True)
class Design:
    """Every policy at every load in every setting: batch size, trace, memory. Raises ConfigError for bad values."""

    model: str = "opt-13b"
    load_format: str = "dummy"
    device: str = "cuda"
    dtype: str = "float16"
    max_batch_sizes: tuple[int, ...] = (16, 64)
    traces: tuple[str, ...] = ("sharegpt-client", "alpaca")
    memories: tuple[str, ...] = ("a100-40g", "all")
    """Of the KV cache: "all" that the device has, "tokens:N", or the GPU of a shipped profile, GPU/MODEL-tp1."""
    loads: tuple[float, ...] = (1.3, 2.0, 0.8)
    """Shares of the service rate. Well above 1, or so short a burst does not even fill the cache of an A100-40GB."""
    policies: tuple[str, ...] = ("fastserve", "fastserve-fcfs", "vllm")
    seconds: float = 6.0
    """Time in which the requests of a run arrive."""
    fewest_requests: int = 40
    seed: int = 0
    gpu_gib: float | None = None
    """Upper bound on the device pool; None: `DEVICE_SHARE` of what is free."""
    host_gib: float | None = None
    """Upper bound on the host pool; None: `HOST_SHARE` of what is free."""

    def __post_init__(self) -> None:
        for name in ("max_batch_sizes", "traces", "memories", "loads", "policies"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name}: give at least one, each once, not {list(values)}")
        for size in self.max_batch_sizes:
            require_int("max_batch_sizes", size, 1)
        for load in self.loads:
            require_positive("loads", load)
        require_positive("seconds", self.seconds)
        require_int("fewest_requests", self.fewest_requests, 1)
        for name in ("gpu_gib", "host_gib"):
            if (value := getattr(self, name)) is not None:
                require_positive(name, value)


def design_from(values: Mapping[str, Any]) -> Design:
    """The design whose tuples are lists, as in JSON and from the command line."""
    given: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in values.items()}
    return Design(**given)


def add_design_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add an option for each field of Design."""
    default = Design()
    several = {"max_batch_sizes": int, "traces": str, "memories": str, "loads": float, "policies": str}
    numbers = {"seconds": float, "fewest_requests": int, "seed": int, "gpu_gib": float, "host_gib": float}
    for field in fields(Design):
        name, value = field.name, getattr(default, field.name)
        option = f"--{name.replace('_', '-')}"
        if name in several:
            shown = " ".join(map(str, value))
            parser.add_argument(option, nargs="+", type=several[name], default=value, help=f"(default: {shown})")
        else:
            parser.add_argument(option, type=numbers.get(name, str), default=value, help="(default: %(default)s)")


def design_of(options: argparse.Namespace) -> Design:
    """The design that these options give. Raises ConfigError for values out of range."""
    return design_from({field.name: getattr(options, field.name) for field in fields(Design)})


def design_arguments(design: Design) -> Iterator[str]:
    """The options that give this design."""
    for name, value in asdict(design).items():
        if value is not None:
            yield f"--{name.replace('_', '-')}"
            yield from map(str, value) if isinstance(value, tuple) else [str(value)]

"""Runner: the interface of what computes iterations, for executors and probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from fastserve.core.config import CacheConfig, ModelConfig
from fastserve.core.errors import ConfigError
from fastserve.core.logprobs import Scores
from fastserve.runtime.models import SequenceInput
from fastserve.runtime.worker.sampler import SamplingLike


class Computed(NamedTuple):
    """The result of an iteration."""

    tokens: list[int]
    """The next token of each sequence; empty if a later stage has them."""
    scores: Mapping[int, Scores] | None = None
    """Log probabilities by index of the sequence; None if none are requested."""


class Runner(Protocol):
    """Computes iterations: a worker, or a group of ranks that each hold a part of the model."""

    @property
    def model_config(self) -> ModelConfig:
        """Architecture of the whole model."""

    @property
    def block_size(self) -> int:
        """Tokens of a block."""

    @property
    def num_gpu_blocks(self) -> int:
        """Blocks of the pool on the device; all ranks have the same number."""

    @property
    def num_host_blocks(self) -> int:
        """Blocks of the host pool."""

    def require(self, model_config: ModelConfig, cache: CacheConfig, device: str, dtype: str) -> None:
        """Raise ConfigError unless the runner can serve an engine of that model, with a cache of that size."""

    def prepare(self, sequences: Sequence[SequenceInput]) -> None:
        """Prepare for the sequences that will probably be executed next."""

    def execute(self, sequences: Sequence[SequenceInput], sampling: Sequence[SamplingLike]) -> list[int]:
        """Compute an iteration; returns the next token of each sequence."""


def require_runner(
    what: str,
    runner: Runner,
    own: tuple[str, str],
    model_config: ModelConfig,
    cache: CacheConfig,
    asked: tuple[str, str],
) -> None:
    """Raise ConfigError, naming the runner as `what`, unless it can serve that model with a cache of that size.

    `own` and `asked` are device and dtype of the runner and of the engine.
    """
    for name, has, wanted in (
        ("model", runner.model_config, model_config),
        ("device", own[0], asked[0]),
        ("dtype", own[1], asked[1]),
        ("block_size", runner.block_size, cache.block_size),
    ):
        if has != wanted:
            raise ConfigError(f"the {what} given has {name} {has!r}, not {wanted!r}; make another")
    for name, most, needed in (
        ("num_gpu_blocks", runner.num_gpu_blocks, cache.num_gpu_blocks),
        ("num_host_blocks", runner.num_host_blocks, cache.num_host_blocks),
    ):
        if needed > most:
            raise ConfigError(f"{name}={needed}: the {what} given has {most}; ask for fewer")

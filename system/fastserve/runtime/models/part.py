"""Part: what one rank builds of a model, and the slices of a checkpoint's tensors that it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastserve.core.config import ModelConfig
from fastserve.core.parallel import Place
from fastserve.runtime.kernels import Kernels, kernels_for
from fastserve.runtime.parallel.groups import ALONE, Group


class Share(NamedTuple):
    """The indices of a dimension that a rank holds."""

    held: range
    of: int
    """Size of the whole dimension."""

    @property
    def is_whole(self) -> bool:
        """Whether the rank holds the whole dimension."""
        return len(self.held) == self.of


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a checkpoint, and the target that it or a slice of it fills: a parameter, or rows of a fused one."""

    name: str
    target: Tensor
    dim: int = 0
    share: Share | None = None
    """The slice along `dim`; None: the whole tensor."""

    @property
    def shape(self) -> list[int]:
        """Shape of the whole tensor in the checkpoint."""
        shape = list(self.target.shape)
        if self.share is not None:
            shape[self.dim] = self.share.of
        return shape

    @property
    def is_whole(self) -> bool:
        """Whether the target takes the whole tensor."""
        return self.share is None or self.share.is_whole

    @property
    def index(self) -> tuple[slice, ...]:
        """Index of the slice in the tensor."""
        assert self.share is not None
        return (slice(None),) * self.dim + (slice(self.share.held.start, self.share.held.stop),)


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a model that one rank builds."""

    config: ModelConfig
    place: Place
    group: Group
    """The shards that share its layers."""
    dtype: torch.dtype
    device: torch.device

    @property
    def kernels(self) -> Kernels:
        """The kernels for its device."""
        return kernels_for(self.device)

    @property
    def hidden(self) -> Share:
        """Dimensions of the hidden state; every shard has all."""
        return Share(range(self.config.hidden_size), self.config.hidden_size)

    @property
    def inner(self) -> Share:
        """Units of the MLP."""
        return Share(self.place.inner(self.config), self.config.intermediate_size)

    @property
    def vocabulary(self) -> Share:
        """Tokens of the vocabulary."""
        return Share(self.place.vocabulary(self.config), self.config.vocab_size)

    @property
    def heads(self) -> Share:
        """Dimensions of all attention heads, concatenated."""
        return self._dimensions(self.place.heads(self.config), self.config.num_heads)

    @property
    def kv_heads(self) -> Share:
        """Dimensions of all KV heads, concatenated."""
        return self._dimensions(self.place.kv_heads(self.config), self.config.num_kv_heads)

    def _dimensions(self, heads: range, of: int) -> Share:
        size = self.config.head_dim
        return Share(range(heads.start * size, heads.stop * size), of * size)

    def empty(self, *shape: int) -> Tensor:
        """An uninitialized tensor for weights."""
        return torch.empty(*shape, dtype=self.dtype, device=self.device)

    @classmethod
    def whole(cls, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Part:
        """The whole model."""
        return cls(config, Place.whole(config), ALONE, dtype, device)

"""Sample tokens from logits."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastserve.core.config import ModelConfig
from fastserve.core.parallel import Place
from fastserve.runtime.parallel.groups import Group
from fastserve.runtime.worker.devices import on_device, tokens_on
from fastserve.runtime.worker.extras import Extras, change_logits

_PARTS = 64
"""Parts into which a row of logits is divided, if its length allows."""


class SamplingLike(Protocol):
    """The sampling parameters that the sampler reads."""

    @property
    def temperature(self) -> float:
        """0 is greedy."""

    @property
    def top_p(self) -> float:
        """Keep the most likely tokens that together reach this probability; 1 keeps all."""

    @property
    def top_k(self) -> int | None:
        """Keep this many most likely tokens; None, 0 and -1 keep all."""

    @property
    def min_p(self) -> float:
        """Keep tokens with at least this share of the most likely token's probability; 0 keeps all."""

    @property
    def seed(self) -> int | None:
        """None draws differently each time."""


class SharedVocabulary:
    """A vocabulary divided over the shards of a stage. All shards make the same calls in the same order.

    Args:
        group: the shards.
        shares: tokens of each shard, consecutive; their numbers differ by at most one.
    """

    def __init__(self, group: Group, shares: Sequence[range]) -> None:
        self._group = group
        self._shares = shares

    @classmethod
    def of(cls, model: ModelConfig, place: Place, group: Group) -> SharedVocabulary | None:
        """The vocabulary of a model divided as at `place`; None if there is one shard."""
        if place.num_shards == 1:
            return None
        return cls(group, [replace(place, shard=shard).vocabulary(model) for shard in range(place.num_shards)])

    def best(self, logits: Tensor) -> Tensor:
        """The most likely tokens, `[rows]`, from this shard's logits; the first of equals, as argmax."""
        index = _argmax(logits).unsqueeze(1)
        own = torch.cat((logits.gather(1, index).double(), (index + self._shares[self._group.index].start).double()), 1)
        values, tokens = self._group.all_gather(own).unbind(2)
        return tokens.gather(0, values.argmax(0, keepdim=True)).squeeze(0).long()

    def whole(self, logits: Tensor) -> Tensor:
        """All logits, `[rows, vocab_size]`, from this shard's columns."""
        widest = max(map(len, self._shares))
        parts = self._group.all_gather(F.pad(logits, (0, widest - logits.shape[1])))
        return torch.cat([part[:, : len(share)] for part, share in zip(parts, self._shares, strict=True)], 1)

    def agreed(self, tokens: Tensor) -> Tensor:
        """The first shard's tokens."""
        return self._group.all_gather(tokens)[0]


def best_tokens(logits: Tensor, shared: SharedVocabulary | None = None) -> Tensor:
    """The most likely token of each row: `[rows]`, int64."""
    return _argmax(logits) if shared is None else shared.best(logits)


def _argmax(logits: Tensor) -> Tensor:
    """Index of the largest logit of each row, the first of equals: `[rows]`."""
    if logits.is_cuda:
        return logits.argmax(-1)
    # On a CPU torch's amax is many times as fast as argmax, and both are faster in float32 than in bfloat16. So find
    # the part with the maximum first, and then its index within that part.
    rows, vocab_size = logits.shape
    parts = logits.float().view(rows, math.gcd(vocab_size, _PARTS), -1)
    part = parts.amax(-1).argmax(-1)
    return part * parts.shape[2] + parts[torch.arange(rows), part].argmax(-1)


def needs_logits(sampling: Sequence[SamplingLike], extras: Extras | None) -> bool:
    """Whether any row needs more than its most likely token."""
    return bool(extras) or any(params.temperature > 0 for params in sampling)


def sample(
    logits: Tensor,
    sampling: Sequence[SamplingLike],
    positions: Sequence[int],
    shared: SharedVocabulary | None = None,
    extras: Extras | None = None,
) -> Tensor:
    """Sample one token per request: `[num_requests]` int64 on the device of `logits`. Does not wait for the device.

    A request's token depends only on its own logits, parameters, seed, position and tokens. So a preempted or
    recomputed request draws the same tokens.

    Args:
        logits: `[num_requests, vocab_size]`; with `shared`, this shard's columns.
        sampling: parameters, one per request.
        positions: index of the new token in each request.
        shared: how shards agree on tokens; None: there is one shard.
        extras: changes of logits, by row.
    """
    tokens = best_tokens(logits, shared)
    changes = {row: one.changes for row, one in extras.items() if one.changes is not None} if extras else {}

    def changed(rows: list[int], index: Tensor) -> Tensor:
        part = logits[index] if shared is None else shared.whole(logits[index])
        if not changes:
            return part
        part = part.double()
        change_logits(part, [changes.get(row) for row in rows])
        return part

    if changes and (rows := [row for row in sorted(changes) if not sampling[row].temperature]):
        index = tokens_on(rows, logits.device)
        tokens.index_copy_(0, index, changed(rows, index).argmax(-1))
    rows = [row for row, params in enumerate(sampling) if params.temperature > 0]
    if rows:
        index = tokens_on(rows, logits.device)
        drawn = _draw(changed(rows, index), [sampling[row] for row in rows], [positions[row] for row in rows])
        # Without a seed each shard draws another token.
        tokens.index_copy_(0, index, drawn if shared is None else shared.agreed(drawn))
    return tokens


def _draw(logits: Tensor, sampling: Sequence[SamplingLike], positions: Sequence[int]) -> Tensor:
    """Draw by inverting the cumulative distribution, most likely token first, at one uniform number per request."""
    device, vocab_size = logits.device, logits.shape[1]
    top_k = [params.top_k if params.top_k and params.top_k > 0 else vocab_size for params in sampling]
    uniform = [_uniform(params.seed, position) for params, position in zip(sampling, positions, strict=True)]
    settings = [(p.temperature, p.top_p, p.min_p, k, u) for p, k, u in zip(sampling, top_k, uniform, strict=True)]
    numbers = on_device(torch.tensor(settings, dtype=torch.float64), device)
    temperature, top_p, min_p, limit, draw = numbers.unsqueeze(2).unbind(1)
    # A stable sort orders equal logits always alike; subtracting the largest avoids overflow at low temperatures.
    scores, order = logits.double().sort(stable=True, dim=-1, descending=True)
    probabilities = ((scores - scores[:, :1]) / temperature).softmax(-1)
    # Forbidden tokens have probability 0.
    kept = (torch.arange(vocab_size, device=device) < limit) & (probabilities > 0)
    if any(params.min_p for params in sampling):
        kept &= probabilities >= min_p * probabilities[:, :1]
    probabilities = probabilities * kept
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    before = probabilities.cumsum(-1) - probabilities
    kept &= before < top_p
    kept[:, 0] = True
    cumulative = (probabilities * kept).cumsum(-1)
    chosen = torch.searchsorted(cumulative, draw * cumulative[:, -1:], right=True)
    chosen = chosen.minimum(kept.sum(-1, keepdim=True) - 1)
    return order.gather(1, chosen).squeeze(1)


def _uniform(seed: int | None, position: int) -> float:
    """A number in [0, 1) that depends only on `seed` and `position`; random without a seed."""
    return random.random() if seed is None else random.Random(f"{seed}:{position}").random()

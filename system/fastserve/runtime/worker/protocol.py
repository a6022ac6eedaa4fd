"""Messages between the engine and its ranks on the control channel (`fastserve.runtime.parallel.channel`).

rank                                    engine
hello: rank, process, host, versions    →
                                        ←  configure: a RankConfig
configured: digest, blocks that fit     →
                                        ←  load: number of blocks of both pools
ready                                   →
                                        ←  run: an iteration; copy: transfers of caches
free: the first stage ended an iteration →
tokens: the last stage ended it         →
copied: the rank ended a transfer       →
                                        ←  probe: an iteration that each stage computes alone
probed: a stage's seconds for that      →
                                        ←  exchange: sizes of messages between ranks to time
exchanged: a stage's seconds for those  →
alive: progress, every second           →
failed: the error, at any time          →
                                        ←  stop
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastserve
from fastserve.core.config import EngineOptions, ModelSource
from fastserve.core.logprobs import Scores, TokenLogprobs
from fastserve.core.parallel import ParallelConfig
from fastserve.kvcache import Direction, Transfer
from fastserve.runtime.models import SequenceInput
from fastserve.runtime.parallel.channel import Message, frame
from fastserve.runtime.worker.extras import Extras, LogitChanges, PromptTargets, RowExtras
from fastserve.runtime.worker.runner import Computed
from fastserve.runtime.worker.sampler import SamplingLike

DIRECTIONS = tuple(Direction)
"""Index of a direction on the wire."""
WORK = ("run", "probe", "exchange")
"""Messages that a rank computes, one after the other."""


@dataclass(frozen=True)
class RankConfig:
    """What every rank is told. On "cuda" a rank takes the GPU of its number on its machine."""

    source: ModelSource
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineOptions = field(default_factory=EngineOptions)
    """Pools are sized for it. A size of None: as many blocks as fit on the rank with the least room."""
    torch_threads: int | None = None
    """Threads a rank computes with; None leaves it torch's choice."""
    timeout_s: float = 8.0
    """Silence after which a side gives up the other one."""
    ranks_on_host: int = 1
    """Ranks that share the memory of this rank's machine. The group finds out and tells each rank."""

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> RankConfig:
        """Return the config that `dataclasses.asdict` turned into `fields`, also after they were JSON."""
        parts = {"source": ModelSource, "parallel": ParallelConfig, "engine": EngineOptions}
        return cls(**dict(fields) | {name: part(**fields[name]) for name, part in parts.items()})


@cache
def versions() -> dict[str, str]:
    """Versions of code, torch and Python, which must be the same in all processes."""
    source = hashlib.sha256()
    root = Path(fastserve.__file__).parent
    for path in sorted(root.rglob("*.py")):
        source.update(path.relative_to(root).as_posix().encode())
        source.update(path.read_bytes())
    return {
        "fastserve": f"{fastserve.__version__} (source {source.hexdigest()[:12]})",
        "torch": torch.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


class _Sampling(NamedTuple):
    """A `SamplingLike` received from the engine."""

    temperature: float
    top_p: float
    top_k: int | None
    seed: int | None
    min_p: float


_GREEDY = _Sampling(0.0, 1.0, None, None, 0.0)


def run_frame(
    index: int,
    sequences: Sequence[SequenceInput],
    sampling: Sequence[SamplingLike],
    extras: Extras | None = None,
    kind: str = "run",
) -> bytes:
    """A message with iteration number `index` for every rank to compute, or with kind "probe" to time."""
    numbers = [index, len(sequences)]
    for one in sequences:
        token_ids, block_table = one.token_ids, one.block_table
        numbers += (one.start, len(token_ids), len(block_table))
        numbers += token_ids
        numbers += block_table
    fields: dict[str, Any] = {}
    if any(params.temperature for params in sampling):
        fields["sampling"] = [
            (p.temperature, p.top_p, p.top_k, p.seed, p.min_p) if p.temperature else None for p in sampling
        ]
    if extras:
        fields["extras"] = [(place, *_packed(one)) for place, one in extras.items()]
    return frame(kind, numbers, **fields)


def parse_run(message: Message) -> tuple[int, list[SequenceInput], list[SamplingLike], Extras | None]:
    """The arguments of `run_frame`, without its kind."""
    numbers = message.numbers
    index, count = numbers[0], numbers[1]
    at, sequences = 2, []
    for _ in range(count):
        tokens_end = at + 3 + numbers[at + 1]
        end = tokens_end + numbers[at + 2]
        sequences.append(SequenceInput(numbers[at + 3 : tokens_end], numbers[at], numbers[tokens_end:end]))
        at = end
    drawn = message.fields.get("sampling") or [None] * count
    sampling: list[SamplingLike] = [_GREEDY if one is None else _Sampling(*one) for one in drawn]
    packed = message.fields.get("extras")
    extras = None if packed is None else {place: _unpacked(*one) for place, *one in packed}
    return index, sequences, sampling, extras


def _packed(extras: RowExtras) -> tuple[Any, ...]:
    """Extras as lists: JSON objects would turn token ids into text."""
    changes = extras.changes
    if changes is not None:
        *others, counts = changes
        return (*others, list(counts.items())), extras.logprobs, extras.prompt
    return None, extras.logprobs, extras.prompt


def _unpacked(changes: list[Any] | None, logprobs: int | None, prompt: list[Any] | None) -> RowExtras:
    if changes is not None:
        *others, counts = changes
        changes = [*others, dict(counts)]
    return RowExtras(
        None if changes is None else LogitChanges(*changes),
        logprobs,
        None if prompt is None else PromptTargets(*prompt),
    )


def tokens_frame(index: int, computed: Computed) -> bytes:
    """A message with the result of iteration number `index`."""
    numbers = (index, *computed.tokens)
    if not computed.scores:
        return frame("tokens", numbers)
    return frame("tokens", numbers, scores=[(place, *one) for place, one in computed.scores.items()])


def parse_tokens(message: Message) -> Computed:
    """The result given to `tokens_frame`."""
    packed = message.fields.get("scores")
    if packed is None:
        return Computed(message.numbers[1:])
    scores = {
        place: Scores([_token_logprobs(each) for each in prompt], None if token is None else _token_logprobs(token))
        for place, prompt, token in packed
    }
    return Computed(message.numbers[1:], scores)


def _token_logprobs(packed: list[Any]) -> TokenLogprobs:
    token, logprob, rank, top = packed
    return TokenLogprobs(token, logprob, rank, [(other, likelihood) for other, likelihood in top])


def copy_frame(transfers: Iterable[tuple[int, Transfer]]) -> bytes:
    """A message with numbered transfers, for every rank to copy its part."""
    numbers: list[int] = []
    for index, transfer in transfers:
        numbers += (index, DIRECTIONS.index(transfer.direction), len(transfer.source))
        numbers += transfer.source
        numbers += transfer.destination
    return frame("copy", numbers)


def parse_copies(message: Message) -> Iterator[tuple[int, Direction, list[int], list[int]]]:
    """Number, direction, sources and destinations of each transfer given to `copy_frame`."""
    numbers, at = message.numbers, 0
    while at < len(numbers):
        index, direction, count = numbers[at : at + 3]
        middle, end = at + 3 + count, at + 3 + 2 * count
        yield index, DIRECTIONS[direction], numbers[at + 3 : middle], numbers[middle:end]
        at = end

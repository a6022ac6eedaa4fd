"""The replay of a workload over HTTP: each request is sent at its time, whatever became of those before it.

Only the schedule decides when a request is sent, and latencies count from the schedule. If a client, a connection or a
cap delays a request, the delay is part of its latency (no coordinated omission).
"""

from __future__ import annotations

import asyncio
import gc
import math
import signal
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastserve.core.checks import require_int
from fastserve.core.errors import ConfigError, ServerError
from fastserve.core.request import RequestStatus
from harness.client.answer import Exchange
from harness.client.replayed import Replay
from harness.client.request import Wording
from harness.client.sender import Sender, max_connections_for, note_when_sent
from harness.client.server import Server, counted_between, open_session, read_counters
from harness.workload.workload import Workload

DEFAULT_VOCABULARY = 1000
"""Token ids below this are in any model's vocabulary."""
_WARMUP_PROMPT, _WARMUP_OUTPUT = 16, 8
"""Tokens of a request of the warm-up."""


@dataclass(frozen=True)
class ReplayOptions:
    """How a workload is replayed. Raises ConfigError for values out of range."""

    max_concurrency: int | None = None
    """Maximum concurrent requests; delay caused by the cap counts as latency. None: no cap."""
    drain_limit_s: float = 600.0
    """Seconds after the last scheduled arrival at which unfinished requests are aborted."""
    warmup: int = 0
    """Number of short requests before the clock starts."""
    wording: Wording = field(default_factory=Wording)
    """The endpoint and the body of requests."""

    def __post_init__(self) -> None:
        if self.max_concurrency is not None:
            require_int("max_concurrency", self.max_concurrency, 1)
        require_int("warmup", self.warmup, 0)
        if not (math.isfinite(self.drain_limit_s) and self.drain_limit_s >= 0):
            raise ConfigError(f"drain_limit must be a finite number of seconds of at least 0, not {self.drain_limit_s}")


def replay(
    server: Server,
    workload: Workload,
    options: ReplayOptions,
    vocab_size: int,
    tokenizer: Any = None,
    on_done: Callable[[], None] = lambda: None,
) -> Replay:
    """Send every request of the workload at its time and return when all have ended; call `on_done` for each.

    Prompts are token ids below `vocab_size`, or, with a tokenizer, the text of these tokens. All are made before the
    clock starts. A failed request does not stop the replay. SIGINT, SIGTERM or SIGHUP ends it and the measurements so
    far are returned; a second signal, or one before the clock starts, acts as usual.
    Raises ServerError if a request of the warm-up fails.
    """

    def body(token_ids: list[int], max_tokens: int) -> bytes:
        prompt = token_ids if tokenizer is None else tokenizer.decode(token_ids, skip_special_tokens=True)
        return options.wording.body(server, prompt, max_tokens)

    rows = zip(
        workload.arrival_s.tolist(), workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True
    )
    exchanges = [Exchange(str(i), *row) for i, row in enumerate(rows)]
    bodies = [body(workload.prompt_token_ids(i, vocab_size), each.max_tokens) for i, each in enumerate(exchanges)]
    warmup = [
        (Exchange(f"warmup-{i}", 0.0, len(ids), _WARMUP_OUTPUT), body(ids, _WARMUP_OUTPUT))
        for i, ids in enumerate(_warmup_prompts(options.warmup, vocab_size, tokenizer))
    ]
    wanted = min(options.max_concurrency or len(exchanges), len(exchanges))
    max_connections = max_connections_for(wanted)
    run_id = uuid.uuid4().hex[:8]

    async def serve() -> tuple[dict[str, int | None], signal.Signals | None]:
        async with open_session(server.root, note_when_sent()) as session:
            sender = Sender(session, server, options.wording, run_id, max_connections)
            if warmup:
                await sender.send_all(warmup, options.drain_limit_s)
            for each, _ in warmup:
                if each.outcome is not RequestStatus.FINISHED:
                    listed = "" if server.is_listed else f"; the server lists {', '.join(server.listed) or 'no models'}"
                    raise ServerError(
                        f"request {each.request_id} of the warm-up was {each.status}: {each.error}{listed}"
                    )
            before = await read_counters(session, server.root)
            stopped_by = await sender.send_until_stopped(
                list(zip(exchanges, bodies, strict=True)), options.drain_limit_s, on_done
            )
            # After a signal, the run asks the server for nothing more.
            after = {} if stopped_by else await read_counters(session, server.root)
            return counted_between(before, after), stopped_by

    gc.collect()
    gc.freeze()  # No collection visits the objects made so far while tokens arrive.
    try:
        counted, stopped_by = asyncio.run(serve())
    finally:
        gc.unfreeze()
    return Replay(server, exchanges, counted, wanted, max_connections, run_id, options.wording.ignore_eos, stopped_by)


def _warmup_prompts(num_prompts: int, vocab_size: int, tokenizer: Any) -> Iterator[list[int]]:
    """Repeat one token in each prompt, so that a server has no prefix of a later prompt in its cache.

    With a tokenizer, take tokens whose text is not empty, unlike that of special tokens.
    """
    candidates: Sequence[int] = range(vocab_size)
    if tokenizer is not None and num_prompts:
        first = candidates[: 2 * num_prompts + 1000]
        candidates = [i for i in first if tokenizer.decode([i], skip_special_tokens=True).strip()] or first
    for i in range(num_prompts):
        yield [candidates[i % len(candidates)]] * _WARMUP_PROMPT

"""A workload: the requests and their arrival times. The same specification and seed give the same bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fastserve.core.errors import ConfigError
from harness.workload.arrivals import Arrivals, parse_arrivals
from harness.workload.traces import LengthSource, RecordedLengths, load_trace
from harness.workload.traces.lengths import FloatArray, IntArray
from harness.workload.traces.plausible import questions

# One independent random stream for each use of the seed: further draws from one never shift another.
_LENGTHS, _GAPS, _TOKEN_IDS = range(3)
_MOST_REQUESTS = 10**9


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests in order of arrival; read-only arrays [n], in seconds and tokens. Compare workloads by `digest`."""

    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    description: str
    seed: int
    questions: tuple[str, ...] = ()
    """Questions about numbers of the trace that are orders of magnitude off."""

    def __post_init__(self) -> None:
        for array in (self.arrival_s, self.prompt_tokens, self.output_tokens):
            array.setflags(write=False)

    def __len__(self) -> int:
        return len(self.arrival_s)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, over the three arrays as little-endian bytes."""
        sha256 = hashlib.sha256(self.arrival_s.astype("<f8").tobytes())
        sha256.update(self.prompt_tokens.astype("<i8").tobytes())
        sha256.update(self.output_tokens.astype("<i8").tobytes())
        return sha256.hexdigest()

    def prompt_token_ids(self, i: int, vocab_size: int) -> list[int]:
        """Make the prompt of request `i`: uniform token ids below `vocab_size`, the same at every call.

        Raises ConfigError for a vocabulary below 1, IndexError if there is no such request.
        """
        if vocab_size < 1:
            raise ConfigError(f"the vocabulary must hold at least 1 token, not {vocab_size}")
        i = range(len(self))[i]
        ids: list[int] = _stream(self.seed, _TOKEN_IDS, i).integers(vocab_size, size=self.prompt_tokens[i]).tolist()
        return ids


def make_workload(
    trace_spec: str | LengthSource,
    arrivals_spec: str | Arrivals,
    rate: float | None,
    num_requests: int,
    seed: int,
    tokenizer: str | None = None,
) -> Workload:
    """Draw `num_requests` requests from a trace and give them arrival times at `rate` requests/s.

    Lengths and gaps have separate random streams: a seed gives the same lengths at every rate, and the same gaps up to
    scale. With `trace` arrivals, the trace's first requests are taken in its order and at its own times, scaled if a
    rate is given. A loaded trace may be passed in place of its specification.
    Raises ConfigError for options out of range, TraceError for a trace that does not fit them.
    """
    if num_requests < 1:
        raise ConfigError(f"num_requests must be at least 1, not {num_requests}")
    if num_requests > _MOST_REQUESTS:
        raise ConfigError(f"num_requests must be at most {_MOST_REQUESTS:,}, not {num_requests}")
    if seed < 0:
        raise ConfigError(f"seed must be at least 0, not {seed}")
    arrivals = parse_arrivals(arrivals_spec) if isinstance(arrivals_spec, str) else arrivals_spec
    is_replay = arrivals.kind == "trace"
    if isinstance(trace_spec, str):
        source, name = load_trace(trace_spec, tokenizer, num_requests if is_replay else None), f"trace {trace_spec!r}"
    else:
        source, name = trace_spec, trace_spec.description
    recorded = source if isinstance(source, RecordedLengths) else None
    if recorded and is_replay:
        recorded = recorded.first(num_requests)
        recorded.check_order()

    arrival_s = arrivals.arrival_times(
        num_requests, rate, _stream(seed, _GAPS), recorded.arrival_s if recorded else None, trace=name
    )
    if not np.isfinite(arrival_s).all():
        raise ConfigError(f"at {rate} requests/s arrival times are too large for a number; choose a higher rate")
    if recorded and is_replay:
        prompt, output = recorded.prompt_tokens, recorded.output_tokens
    else:
        prompt, output = source.sample(num_requests, _stream(seed, _LENGTHS))
    pace = "the trace's own rate" if rate is None else f"{rate:g} requests/s"
    description = f"{source.description}; {arrivals} arrivals at {pace}; {num_requests} requests, seed {seed}"
    asked = questions(name, recorded, is_replay=is_replay and rate is None) if recorded else ()
    return Workload(arrival_s, prompt, output, description, seed, tuple(asked))


def _stream(seed: int, *use: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=use))

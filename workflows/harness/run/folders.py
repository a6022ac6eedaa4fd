"""Default names of result folders."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from fastserve.policies.discovery import file_name
from harness.run.config import RunConfig
from harness.workload.traces import is_file_trace

_UNSAFE = re.compile(r"[^A-Za-z0-9._=+-]+")
_LONGEST_PART, _DIGITS = 60, 8


def default_folder(config: RunConfig) -> Path:
    """The default folder of `fastbench run`, named after backend, policy, trace, rate and seed."""
    rate = "own-rate" if config.rate is None else f"rate{config.rate:g}"
    return Path("results") / "-".join([*_parts(config), rate, f"seed{config.seed}"])


def default_capacity_folder(config: RunConfig) -> Path:
    """The default folder of `fastbench capacity`, named after backend, policy and trace."""
    return Path("results") / "-".join(["capacity", *_parts(config)])


def _parts(config: RunConfig) -> Iterator[str]:
    """Backend, policy (unless only the server knows it) and trace."""
    trace = config.trace
    if is_file_trace(trace):
        kind, _, path = trace.partition(":")
        trace = f"{kind}-{Path(path.partition(',')[0]).stem}"
    for text in (config.backend, file_name(config.policy), trace):
        if part := _file_name(text):
            yield part


def _file_name(text: str) -> str:
    """Replace the characters of the text that file names should not have; end a long text in a digest."""
    safe = _UNSAFE.sub("-", text).strip("-.")
    if len(safe) > _LONGEST_PART:
        digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
        safe = f"{safe[: _LONGEST_PART - _DIGITS - 1]}-{digest}"
    return safe

"""A server to be measured over HTTP: its address, its models, its counters."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
from yarl import URL

from fastserve.core.errors import ConfigError, ServerError

API_KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable with the key that a server may ask for. The key is sent, but never written to a file."""
_TIMEOUT = aiohttp.ClientTimeout(total=30.0)
"""Timeout of questions about the server; completions have none."""
_KEEP_IDLE_S = 2.0
"""Idle connections are closed after this time. Servers close them after 5 s or more, and a request on a connection that
is just being closed fails."""
_PATIENCE_S = 60.0
"""A server that answers 429 or 503 may be loading its model; it is asked again for this time."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 10.0
"""Pause between two such questions if the server names no time; it doubles each time."""
_COUNTING = ("fastserve", "vllm")
"""Owners of models whose servers can count the tokens of each event (stream_options' continuous_usage_stats)."""
_LONGEST_MESSAGE = 300
_COUNTERS = {
    "preemptions": ("fastserve_preemptions_total", "vllm:num_preemptions_total"),
    "swap_out_bytes": ("fastserve_swap_out_bytes_total",),
    "swap_in_bytes": ("fastserve_swap_in_bytes_total",),
    "recomputed_tokens": ("fastserve_recomputed_tokens_total",),
    "cached_prompt_tokens": ("fastserve_cached_tokens_total", "vllm:prefix_cache_hits_total"),
    "iterations": ("fastserve_iterations_total",),
}
"""Keys of summary.json that only a server can count, and their names in GET /metrics."""


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server, and the model that requests name."""

    root: URL
    """The address before /v1/completions."""
    card: Mapping[str, Any]
    """The model's entry in GET /v1/models; only the id if the model is not listed."""
    version: str | None
    """The server's version, if it answers GET /version."""
    listed: tuple[str, ...]
    """Names of the models in GET /v1/models; empty without such a list."""

    @property
    def model(self) -> str:
        """The name under which the model is served."""
        return str(self.card["id"])

    @property
    def is_listed(self) -> bool:
        """Whether the server lists the model. A server that loads models on demand may have it without listing it."""
        return self.model in self.listed

    @property
    def counts_per_event(self) -> bool:
        """Whether the server can count the tokens of each event."""
        return self.card.get("owned_by") in _COUNTING

    @property
    def vocab_size(self) -> int | None:
        """Size of the model's vocabulary, if the card has it."""
        size = self.card.get("vocab_size")
        return size if isinstance(size, int) and size > 0 else None

    @property
    def public_url(self) -> str:
        """The server's address without credentials."""
        return str(self.root.with_user(None))

    def policy(self, given: str) -> str:
        """The policy of the server: the card's, else the label `given`, else the card's owner.

        Raises ConfigError if `given` is another policy than the card's.
        """
        named = self.card.get("policy")
        if named and given and named != given:
            raise ConfigError(
                f"the server at {self.public_url} runs policy {named!r}, not {given!r}; start it with that policy, or "
                "leave --policy out"
            )
        return str(named or given or self.card.get("owned_by") or "unknown")


def contact(url: str, model: str | None = None) -> Server:
    """Ask the server at `url` what it serves. `model` is the name of one of its models; None takes the first.

    A named model need not be listed. A server that answers 429 or 503 is asked again for up to a minute, at the times
    of its Retry-After if it has one; stderr says so.
    Raises ConfigError for a malformed URL, ServerError if the server does not answer, or not like an OpenAI-compatible
    server.
    """
    return asyncio.run(_contact(_root(url), model))


def open_session(root: URL, trace: aiohttp.TraceConfig | None = None) -> aiohttp.ClientSession:
    """Open a pool of connections without a limit, with the key if there is one."""
    headers = {"Accept-Encoding": "identity"}
    key = os.environ.get(API_KEY_VARIABLE)
    if key and root.user is None:
        headers["Authorization"] = f"Bearer {key}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_IDLE_S, ttl_dns_cache=None),
        timeout=aiohttp.ClientTimeout(),
        headers=headers,
        trace_configs=[trace] if trace else None,
    )


async def read_counters(session: aiohttp.ClientSession, root: URL) -> dict[str, float]:
    """Read the server's totals since its start, by their keys in summary.json; may be empty.

    It is empty without the package prometheus-client.
    """
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        return {}
    try:
        status, text, _ = await _get(session, root / "metrics")
        families = list(text_string_to_metric_families(text.decode())) if status == 200 else []
    except (ServerError, ValueError, LookupError):  # The last two come from a text that is not metrics.
        return {}
    samples = [sample for family in families for sample in family.samples]
    found = {name: [sample.value for sample in samples if sample.name in theirs] for name, theirs in _COUNTERS.items()}
    return {name: sum(values) for name, values in found.items() if values}


def counted_between(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, int | None]:
    """The counts between two readings; None for counters that a reading lacks."""
    return {name: round(after[name] - before[name]) if name in before and name in after else None for name in _COUNTERS}


def message_of(answer: bytes) -> str:
    """The error message of an answer, in one of the usual forms, else the whole answer; shortened."""
    try:
        content = json.loads(answer)
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        error = content.get("error") or content
        if isinstance(error, dict):
            error = error.get("message") or error.get("detail") or content
        text = error if isinstance(error, str) else json.dumps(error)
    else:
        text = answer.decode(errors="replace")
    text = " ".join(text.split()) or "nothing"
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}…"


def _root(url: str) -> URL:
    try:
        parsed = URL(url)
        port = parsed.port
    except ValueError:
        parsed, port = URL(), None
    if parsed.scheme not in ("http", "https") or not parsed.host or not port or parsed.query_string or parsed.fragment:
        raise ConfigError(f"--url must be the address of a server, such as http://127.0.0.1:8000, not {url!r}")
    return parsed.with_path(parsed.raw_path.rstrip("/").removesuffix("/v1"), encoded=True)


async def _contact(root: URL, model: str | None) -> Server:
    async with open_session(root) as session:
        status, answer = await _get_patiently(session, root / "v1" / "models")
        where = f"{root.with_user(None) / 'v1' / 'models'}"
        if status in (401, 403, 429, 503) or (status != 200 and model is None):
            remedy = (
                f"--url must lead to an OpenAI-compatible server; {API_KEY_VARIABLE} holds the key that is sent"
                if status in (401, 403)
                else "start it again, or wait until it is ready"
                if status in (429, 503)
                else "--url must lead to an OpenAI-compatible server; if it lists no models, name one with --model"
            )
            raise ServerError(f"{where} answered {status}: {message_of(answer)}; {remedy}")
        cards = _cards(answer) if status == 200 else {}
        if not cards and model is None:
            raise ServerError(
                f"{where} lists no model: {message_of(answer)}; if that is an OpenAI-compatible server, name one with "
                "--model"
            )
        model = model or next(iter(cards))
        try:
            status, answer, _ = await _get(session, root / "version")
        except ServerError:
            status = 0
        version = _version(answer) if status == 200 else None
        return Server(root, cards.get(model, {"id": model}), version, tuple(cards))


async def _get_patiently(session: aiohttp.ClientSession, url: URL) -> tuple[int, bytes]:
    """Get status and body. A 429 or 503 is returned only if the time is used up, or does not cover the Retry-After."""
    end, pause = time.monotonic() + _PATIENCE_S, _FIRST_PAUSE_S
    while True:
        status, answer, retry_after = await _get(session, url)
        wait = pause if retry_after is None else max(retry_after, _FIRST_PAUSE_S)
        if status not in (429, 503) or time.monotonic() + wait > end:
            return status, answer
        print(
            f"{url.with_user(None)} answered {status} ({message_of(answer)}); asked again in {wait:g} s",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        await asyncio.sleep(wait)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


async def _get(session: aiohttp.ClientSession, url: URL) -> tuple[int, bytes, float | None]:
    """Get status, body, and the seconds of a Retry-After, if there is one."""
    try:
        async with session.get(url, timeout=_TIMEOUT, allow_redirects=False) as response:
            return response.status, await response.read(), _seconds(response.headers.get("Retry-After"))
    except (aiohttp.ClientError, OSError) as error:
        raise ServerError(
            f"no answer from {url.with_user(None)}: {str(error) or type(error).__name__}; start the server, or correct "
            "--url"
        ) from error


def _seconds(retry_after: str | None) -> float | None:
    """Read a Retry-After, a number of seconds or a date; None for another value."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        date = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return (date - datetime.now(UTC)).total_seconds() if date.tzinfo else None


def _cards(answer: bytes) -> dict[str, dict[str, Any]]:
    """Read the models by name; none if the answer is not a list of models."""
    try:
        data = json.loads(answer)["data"]
        return {card["id"]: card for card in data if isinstance(card["id"], str)}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def _version(answer: bytes) -> str | None:
    try:
        return str(json.loads(answer)["version"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None

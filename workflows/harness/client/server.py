"""A server to be measured over HTTP: where it is, and what it says of itself."""

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
"""Environment variable with the key that a server may ask for. It is sent, and recorded nowhere."""
_TIMEOUT = aiohttp.ClientTimeout(total=30.0)
"""Of what a server says of itself; completions have none."""
_KEEP_IDLE_S = 2.0
"""Servers close idle connections after 5 s or more; a request must not be sent into one that is just being closed."""
_PATIENCE_S = 60.0
"""How long a server that answers 429 or 503 is asked again what it serves: it may be loading its model."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 10.0
"""Between two such questions, where the server names no time; doubled each time."""
_COUNTING = ("fastserve", "vllm")
"""Owners of models whose servers say with each event how many tokens there are (stream_options'
continuous_usage_stats)."""
_LONGEST_MESSAGE = 300
_COUNTERS = {
    "preemptions": ("fastserve_preemptions_total", "vllm:num_preemptions_total"),
    "swap_out_bytes": ("fastserve_swap_out_bytes_total",),
    "swap_in_bytes": ("fastserve_swap_in_bytes_total",),
    "recomputed_tokens": ("fastserve_recomputed_tokens_total",),
    "iterations": ("fastserve_iterations_total",),
}
"""Keys of summary.json that only a server can count, and what servers call them in GET /metrics."""


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server and the model of it that is asked for."""

    root: URL
    """What /v1/completions follows."""
    card: Mapping[str, Any]
    """The model's entry in GET /v1/models; of a model that is not listed, its id alone."""
    version: str | None
    """Of the server, if it says so (GET /version)."""
    listed: tuple[str, ...]
    """Names of the models in GET /v1/models; empty if the server has no such list."""

    @property
    def model(self) -> str:
        """The name it is served under."""
        return str(self.card["id"])

    @property
    def is_listed(self) -> bool:
        """Whether the server says that it has the model. A server that loads models when asked need not."""
        return self.model in self.listed

    @property
    def counts_per_event(self) -> bool:
        """Whether the server knows how to say with each event how many tokens there are."""
        return self.card.get("owned_by") in _COUNTING

    @property
    def vocab_size(self) -> int | None:
        """Tokens in the model's vocabulary, if the card says."""
        size = self.card.get("vocab_size")
        return size if isinstance(size, int) and size > 0 else None

    @property
    def public_url(self) -> str:
        """Its address without credentials."""
        return str(self.root.with_user(None))

    def policy(self, given: str) -> str:
        """What schedules here: what the card says, else the label `given`, else who made the server.

        Raises ConfigError if another policy was asked for than the card names.
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

    A named model need not be listed, and the server then need not list any. A server that answers 429 or 503 is asked
    again for up to a minute, or when its Retry-After says so, and stderr is told.
    Raises ConfigError for a URL that cannot be meant, ServerError for a server that does not answer, or not as an
    OpenAI-compatible one does.
    """
    return asyncio.run(_contact(_root(url), model))


def open_session(root: URL, trace: aiohttp.TraceConfig | None = None) -> aiohttp.ClientSession:
    """One pool of connections, as many as are needed, with the key if there is one."""
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
    """Totals since the server's start, by their keys in summary.json: those it has, none without prometheus-client."""
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        return {}
    try:
        status, text, _ = await _get(session, root / "metrics")
        families = list(text_string_to_metric_families(text.decode())) if status == 200 else []
    except (ServerError, ValueError, LookupError):  # The last two from a text that is no metrics.
        return {}
    samples = [sample for family in families for sample in family.samples]
    found = {name: [sample.value for sample in samples if sample.name in theirs] for name, theirs in _COUNTERS.items()}
    return {name: sum(values) for name, values in found.items() if values}


def counted_between(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, int | None]:
    """What was counted from one reading to the other; None for what either lacks."""
    return {name: round(after[name] - before[name]) if name in before and name in after else None for name in _COUNTERS}


def message_of(answer: bytes) -> str:
    """What an answer says went wrong: the message in it, in one of the usual forms, or all of it; shortened."""
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
    """Status and body; of a 429 or 503 only when there is no more time, or the server asks for more than there is."""
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
    """Status, body, and in how many seconds the server wants to be asked again, if it says."""
    try:
        async with session.get(url, timeout=_TIMEOUT, allow_redirects=False) as response:
            return response.status, await response.read(), _seconds(response.headers.get("Retry-After"))
    except (aiohttp.ClientError, OSError) as error:
        raise ServerError(
            f"no answer from {url.with_user(None)}: {str(error) or type(error).__name__}; start the server, or correct "
            "--url"
        ) from error


def _seconds(retry_after: str | None) -> float | None:
    """A Retry-After, which is a number of seconds or a date; None for anything else."""
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
    """Models by name; none if this is no list of models."""
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

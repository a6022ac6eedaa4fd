"""A server to be measured over HTTP: where it is, and what it says of itself."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from yarl import URL

from fastserve.errors import ConfigError, ServerError

API_KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable with the key that a server may ask for. It is sent, and recorded nowhere."""
_TIMEOUT = aiohttp.ClientTimeout(total=30.0)
"""Of what a server says of itself; completions have none."""
_KEEP_IDLE_S = 2.0
"""Servers close idle connections after 5 s or more; a request must not be sent into one that is just being closed."""
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
    """The model's entry in GET /v1/models."""
    version: str | None
    """Of the server, if it says so (GET /version)."""

    @property
    def model(self) -> str:
        """The name it is served under."""
        return str(self.card["id"])

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

    Raises ConfigError for a URL or a model that cannot be meant, ServerError for a server that does not answer, or not
    as an OpenAI-compatible one does.
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
        status, text = await _get(session, root / "metrics")
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
    except ValueError:
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
        status, answer = await _get(session, root / "v1" / "models")
        where = f"{root.with_user(None) / 'v1' / 'models'}"
        if status != 200:
            key = f"; {API_KEY_VARIABLE} holds the key that is sent" if status in (401, 403) else ""
            raise ServerError(
                f"{where} answered {status}: {message_of(answer)}; --url must lead to an OpenAI-compatible server{key}"
            )
        cards = _cards(answer)
        if not cards:
            raise ServerError(f"{where} lists no model: {message_of(answer)}; is that an OpenAI-compatible server?")
        if model is not None and model not in cards:
            raise ConfigError(f"the server has no model {model!r}; it serves {', '.join(cards)}")
        status, answer = await _get(session, root / "version")
        return Server(root, cards[model or next(iter(cards))], _version(answer) if status == 200 else None)


async def _get(session: aiohttp.ClientSession, url: URL) -> tuple[int, bytes]:
    try:
        async with session.get(url, timeout=_TIMEOUT, allow_redirects=False) as response:
            return response.status, await response.read()
    except (aiohttp.ClientError, OSError) as error:
        raise ServerError(
            f"no answer from {url.with_user(None)}: {str(error) or type(error).__name__}; start the server, or correct "
            "--url"
        ) from error


def _cards(answer: bytes) -> dict[str, dict[str, Any]]:
    """Models by name; none if this is no list of models."""
    try:
        data = json.loads(answer)["data"]
        return {card["id"]: card for card in data if isinstance(card["id"], str)}
    except (ValueError, KeyError, TypeError):
        return {}


def _version(answer: bytes) -> str | None:
    try:
        return str(json.loads(answer)["version"])
    except (ValueError, KeyError, TypeError):
        return None

"""Requests to a server: their endpoint and their body."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastserve.core.errors import ConfigError

if TYPE_CHECKING:
    from harness.client.server import Server

ENDPOINTS = {"completions": ("v1", "completions"), "chat": ("v1", "chat", "completions")}
"""Kinds of request, and the path of each below the server's address."""
_OF_THE_RUN = ("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "stream", "n", "best_of")
"""Fields that the run sets, or that change the number of outputs of a request."""


@dataclass(frozen=True)
class Wording:
    """The wording of requests. Raises ConfigError for values out of range."""

    endpoint: str = "completions"
    """A key of ENDPOINTS. Chats need prompts of text."""
    ignore_eos: bool = True
    """Whether the server is asked for exactly as many tokens as the trace has. Strict servers reject the field; without
    it, the model ends its outputs."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Merged into every body as a JSON merge patch (RFC 7386): objects are merged, null removes a field."""

    def __post_init__(self) -> None:
        if self.endpoint not in ENDPOINTS:
            raise ConfigError(f"--endpoint must be {' or '.join(ENDPOINTS)}, not {self.endpoint!r}")
        if decided := [name for name in _OF_THE_RUN if name in self.extra_body]:
            raise ConfigError(f"--extra-body must not hold {', '.join(decided)}: the trace and --model set them")

    @property
    def path(self) -> str:
        """The path of requests, below the server's address."""
        return "/".join(ENDPOINTS[self.endpoint])

    def body(self, server: Server, prompt: str | Sequence[int], max_tokens: int) -> bytes:
        """Make the body of a request for a stream of at most `max_tokens` tokens. In a chat, the prompt is its message.

        If the server can count the tokens of each event, the body asks for it.
        """
        asked = {"prompt": prompt} if self.endpoint == "completions" else {
            "messages": [{"role": "user", "content": prompt}]
        }  # fmt: skip
        content = {
            "model": server.model,
            **asked,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            **({"ignore_eos": True} if self.ignore_eos else {}),
            "stream": True,
            "stream_options": {
                "include_usage": True,
                **({"continuous_usage_stats": True} if server.counts_per_event else {}),
            },
        }
        return json.dumps(_merged(content, self.extra_body), separators=(",", ":")).encode()

    def hint(self, status: int, message: str) -> str:
        """Name an option that may help after this error, to follow its message; empty if none is known."""
        if status in (404, 405, 501) and "model" not in message.lower():
            other = "chat --prompts text --tokenizer DIR" if self.endpoint == "completions" else "completions"
            return f"; the server may have no /{self.path}: try --endpoint {other}"
        if self.ignore_eos and "ignore_eos" in message:
            return "; the server refuses a field that OpenAI does not have: add --no-ignore-eos"
        for name in ("stream_options", "temperature"):
            if name in message and name not in self.extra_body:
                return f"; to leave the field out, add --extra-body '{{\"{name}\": null}}'"
        if self.endpoint == "completions" and "prompt" in message and "string" in message:
            return "; a server that takes no token ids needs --prompts text --tokenizer DIR"
        return ""


def parse_extra_body(text: str | None) -> dict[str, Any]:
    """Parse `{"top_k": 1}`; None gives an empty mapping. Raises ConfigError unless the text is a JSON object."""
    if text is None:
        return {}

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        content = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--extra-body {text[:80]!r} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f'--extra-body must be a JSON object, such as {{"top_k": 1}}, not {text[:80]!r}')
    return content


def _merged(content: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(content)
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, Mapping):
            before = merged.get(name)
            merged[name] = _merged(before if isinstance(before, Mapping) else {}, value)
        else:
            merged[name] = value
    return merged

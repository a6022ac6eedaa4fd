"""What `fastserve serve` can be told: what it serves, and how the server behaves whatever it serves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastserve.core.checks import Integer, OneOf, Positive
from fastserve.core.config import EngineOptions, ModelSource, Processes
from fastserve.core.errors import ConfigError
from fastserve.core.options import check_options, option
from fastserve.core.parallel import ParallelConfig
from fastserve.server.http.log import LOG_LEVELS


def names_of(values: Iterable[str]) -> tuple[str, ...]:
    """Parse option values, each of which is one name, several with commas between, or a JSON list."""
    names: list[str] = []
    for value in values:
        if value.lstrip().startswith("["):
            try:
                listed = json.loads(value)
            except ValueError as error:
                raise ConfigError(f"{value!r} is no JSON list: {error}") from error
            if not all(isinstance(name, str) for name in listed):
                raise ConfigError(f"{value!r} must be a JSON list of texts")
            names += listed
        else:
            names += [name.strip() for name in value.split(",")]
    return tuple(dict.fromkeys(name for name in names if name))


def _parse_names(values: list[str] | None) -> tuple[str, ...]:
    return names_of(values or ())


def _parse_hosts(values: list[str] | None) -> tuple[str, ...] | None:
    return None if values is None else names_of(values)


def _parse_key(text: str | None) -> str | None:
    return text or None


@dataclass(frozen=True)
class ModelOptions:
    """Which model is served, under which policy, on what."""

    source: ModelSource = field(default_factory=ModelSource)
    policy: str = option(
        "fastserve", "Scheduling policy: see `fastbench policies`, or FILE.py:Class or package.module:Class."
    )
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    engine: EngineOptions = field(default_factory=EngineOptions)
    served_names: tuple[str, ...] = option(
        (),
        "Name that clients use for the model; repeat it for further names.",
        flag="--served-model-name",
        parse=_parse_names,
        show_default="the preset's, the directory's or the profile's",
    )
    """The server itself says the first."""
    backend: str = option(
        "engine",
        "engine: a real model; sim: no model; replays the profile's timings in real time and emits numbered tokens.",
    )
    profile: str | None = option(
        None, "Latency profile: required by sim; replaces measuring for policies that need one."
    )
    tokenizer: str | None = option(
        None,
        "Directory of a tokenizer, builtin or none.",
        show_default="the model directory's; of a preset or a simulation builtin",
    )
    generation_config: str = option(
        "auto",
        "auto: end tokens and sampling defaults from the model's generation_config.json; none: ignore it.",
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    processes: Processes = field(default_factory=Processes)

    def __post_init__(self) -> None:
        if self.backend not in ("engine", "sim"):
            raise ConfigError(f"unknown backend {self.backend!r}; known: engine, sim")
        if self.backend == "engine":
            if not self.source.model:
                raise ConfigError("--model is missing: a directory in Hugging Face format or a preset")
            return
        if self.profile is None:
            raise ConfigError("--backend sim needs --profile; `fastbench profiles` lists those shipped")
        for given, default in (
            (self.source, ModelSource()), (self.parallel, ParallelConfig()), (self.processes, Processes()),
        ):  # fmt: skip
            for name, value in asdict(given).items():
                if value != getattr(default, name):
                    raise ConfigError(f"--{name.replace('_', '-')} applies to --backend engine only")
        if self.generation_config != "auto":
            raise ConfigError("--generation-config applies to --backend engine only")


@dataclass(frozen=True)
class ServerOptions:
    """How the server behaves, whatever it serves. ConfigError for a value out of range."""

    port: int = option(8000, "Port to listen at; 0 for any free one.", Integer(0, 65_535))
    host: str = option("127.0.0.1", "Address to listen at; 0.0.0.0 for every network.")
    api_key: str | None = option(None, "Ask clients for this key.", parse=_parse_key, envvar="FASTSERVE_API_KEY")
    """Asked for at /v1, /tokenize, /detokenize and the live page's data."""
    max_requests: int = option(
        10_000, "Most unfinished requests to hold; further requests are answered 429.", Integer(1)
    )
    drain_timeout_s: float = option(
        30.0, "Seconds to finish the requests in progress after the server is told to stop.", Positive()
    )
    stall_timeout_s: float = option(
        60.0, "Seconds without an iteration, while requests wait, until /health says stalled.", Positive()
    )
    receive_timeout_s: float = option(
        60.0,
        "Seconds for a request's head and body to arrive; later ones are answered 408 and disconnected.",
        Positive(),
    )
    page: bool = option(True, "Show a live page at /.")
    allowed_origins: tuple[str, ...] = option(
        (),
        "Origins whose pages may use the server from a browser (CORS), * for any; repeat it, or give a list.",
        parse=_parse_names,
    )
    allowed_hosts: tuple[str, ...] | None = option(
        None,
        "Names that the Host header may have, *.example.com for all below one, * for any; repeat it, or give a list.",
        parse=_parse_hosts,
        show_default="on a loopback address localhost, else any",
    )
    """IP addresses are always allowed. None on a loopback address: `localhost`, `*.localhost` and `host`."""
    root_path: str = option("", "Path below which a proxy offers the server, such as /llm.")
    ssl_certfile: Path | None = option(None, "Certificate chain (PEM); with it the server speaks HTTPS only.")
    ssl_keyfile: Path | None = option(
        None, "The certificate's private key (PEM), not encrypted.", show_default="in --ssl-certfile"
    )
    timeline: Path | None = option(
        None, "File for a trace of all requests. It is written at the end and kept in memory until then."
    )
    log_level: str = option("warning", "error, warning, info (a line for each request) or debug.", OneOf(LOG_LEVELS))

    def __post_init__(self) -> None:
        check_options(self)
        for origin in self.allowed_origins:
            scheme, separator, rest = origin.partition("://")
            if origin not in ("*", "null") and not (scheme and separator and rest and "/" not in rest):
                raise ConfigError(
                    f"allowed_origins: {origin!r} is no origin; give scheme, host and port, such as "
                    "https://example.com or http://localhost:3000, without a path, or *"
                )
        for host in self.allowed_hosts or ():
            if "/" in host or "*" in host.removeprefix("*.").removeprefix("*") or ":" in host:
                raise ConfigError(
                    f"allowed_hosts: {host!r} is no name; give one such as llm.example.com, *.example.com, or *"
                )
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"root_path must begin with / and not end with one, such as /llm, got {self.root_path!r}")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError(f"ssl_keyfile={self.ssl_keyfile} needs ssl_certfile, the certificate of that key")

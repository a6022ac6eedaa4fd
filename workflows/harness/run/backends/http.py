"""The HTTP backend: a server elsewhere, driven as a client."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fastserve.core.console import Progress
from fastserve.core.errors import ConfigError, ServerError
from fastserve.core.tokenizer import load_tokenizer
from harness.run.backends.interface import Measurement
from harness.run.config import RunConfig, backend_options
from harness.run.recorder import RunRecorder, TableSink
from harness.run.results import CLIENT_COLUMNS, REQUEST_COLUMNS
from harness.run.summary import summarize_lateness, why_late
from harness.workload.workload import Workload

if TYPE_CHECKING:
    from harness.client.server import Server


class HttpBackend:
    """Sends the workload to a server. What was measured before an interruption is kept."""

    def __init__(self, config: RunConfig) -> None:
        if config.url is None:
            raise ConfigError("--backend http needs --url: the address of a server, such as http://127.0.0.1:8000")
        if config.prompts not in ("ids", "text"):
            raise ConfigError(f"--prompts must be ids or text, not {config.prompts!r}")
        if config.prompts == "text" and config.tokenizer is None:
            raise ConfigError(
                "--prompts text needs --tokenizer: the directory of one in Hugging Face format, or builtin"
            )
        if config.endpoint == "chat" and config.prompts != "text":
            raise ConfigError("--endpoint chat takes no token ids: add --prompts text --tokenizer DIR")
        # Here and below, since a simulation imports this module too, and aiohttp is slow to import.
        from harness.client.replay import ReplayOptions
        from harness.client.request import Wording

        self._url = config.url
        self._config = config
        wording = Wording(config.endpoint, config.ignore_eos, config.extra_body)
        self._options = ReplayOptions(config.max_concurrency, config.drain_limit_s, config.warmup, wording)

    def prepare(self) -> None:
        """Load the tokenizer and ask the server what it serves. Raises ServerError if it does not answer."""
        from harness.client.replay import DEFAULT_VOCABULARY
        from harness.client.server import contact

        config = self._config
        self._tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer and config.prompts == "text" else None
        self._server: Server = contact(self._url, config.model)
        if not self._server.is_listed:  # A request of the warm-up shows whether the server has the model.
            self._options = replace(self._options, warmup=max(self._options.warmup, 1))
        vocabularies = (self._server.vocab_size, len(self._tokenizer) if self._tokenizer else None)
        self._vocab_size = config.vocab_size or min(filter(None, vocabularies), default=DEFAULT_VOCABULARY)
        self._config = replace(
            config,
            policy=self._server.policy(config.policy),
            model=self._server.model,
            url=self._server.public_url,
            vocab_size=self._vocab_size,
            warmup=self._options.warmup,
        )

    def measure(self, workload: Workload, tables: TableSink) -> Measurement:
        """Send every request at its time and measure as a client sees it."""
        from harness.client.replay import replay

        with Progress(f"{self._config.policy} over http", len(workload)) as progress:
            replayed = replay(
                self._server, workload, self._options, self._vocab_size, self._tokenizer, progress.advance
            )
        stopped_by = replayed.stopped_by
        recorder = RunRecorder(tables, REQUEST_COLUMNS | CLIENT_COLUMNS)
        recorder.add_rows(replayed.exchanges)
        recorder.finish()
        summary = recorder.summary(replayed.counted) | summarize_lateness(replayed.lateness_s)
        error = None
        if stopped_by:
            finished = f"{summary['finished']} of {recorder.tally.num_requests} requests had finished"
            error = ServerError(f"{stopped_by.name} ended the run: {finished}")
        warnings = list(filter(None, (why_late([summary]), *replayed.warnings)))
        return Measurement(
            config=self._config,
            resolved=backend_options(self._config),
            summary=summary,
            tally=recorder.tally,
            stopped_by=stopped_by,
            error=error,
            warnings=warnings,
            meta={"warnings": warnings, **replayed.meta},
        )

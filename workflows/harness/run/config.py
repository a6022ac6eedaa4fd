"""What determines a run: the backend, the workload, the policy, and the options that each backend takes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, dataclass, fields
from typing import Any

from fastserve.core.checks import Check, Integer
from fastserve.core.config import ModelSource, Processes
from fastserve.core.errors import ConfigError
from fastserve.core.options import Option, check_options, described, flag_of, option, option_of
from fastserve.core.parallel import ParallelConfig
from fastserve.policies.discovery import find_policy, list_policies
from fastserve.policies.settings import parse_settings
from harness.client.request import parse_extra_body

BACKENDS = ("sim", "engine", "http")
SAME_TRACE = "same"
"""As a history: the run's own trace."""


def _engine_option(definition: type, name: str) -> Any:
    """An option that only the real engine takes, as another class defines it."""
    return option_of(definition, name, backends=("engine",))


def _http_option(default: Any, help: str, check: Check | None = None, **more: Any) -> Any:
    """An option that only runs over HTTP take."""
    return option(default, help, check, backends=("http",), **more)


def _parse_no_ignore_eos(given: bool) -> bool:
    return not given


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run, with one field for each option of `fastbench run`.

    Its fields stand side by side, as in meta.json; `source` and `parallel` are what an engine is made of. ConfigError
    for a value out of range.
    """

    backend: str = option("sim", "sim: virtual time from a profile; engine: a real model; http: a server elsewhere.")
    policy: str = option(
        "",
        "Scheduling policy: see `fastbench policies`, or FILE.py:Class or package.module:Class.",
        show_default="fastserve; http: the server's own",
    )
    trace: str = option("sharegpt", "Request lengths: see `fastbench traces`.")
    arrivals: str = option("poisson", "poisson, gamma:cv=4, constant or trace.")
    rate: float | None = option(None, "Requests per second; optional with trace arrivals.")
    num_requests: int = option(400, "Requests to serve.")
    seed: int = option(0, "Same seed, same requests, for every policy.")
    history: str | None = option(
        None,
        "Lengths of requests that finished earlier (same: of --trace), taught to a policy that learns.",
        metavar="TRACE",
        backends=("sim", "engine"),
    )
    history_requests: int = option(
        0, "How many requests of --history are taught.", Integer(0), backends=("sim", "engine")
    )
    profile: str | None = option(
        None, "Latency profile: see `fastbench profiles`, or a .json.", backends=("sim", "engine")
    )
    model: str | None = option(
        None,
        "Model directory or preset (engine); name under which the server has it (http).",
        show_default="http: the first",
        backends=("engine", "http"),
    )
    device: str = _engine_option(ModelSource, "device")
    dtype: str = _engine_option(ModelSource, "dtype")
    load_format: str = _engine_option(ModelSource, "load_format")
    tokenizer: str | None = option(
        None, "Directory of a tokenizer, or builtin, to count a trace's text, and for --prompts text."
    )
    torch_threads: int | None = _engine_option(Processes, "torch_threads")
    tensor_parallel_size: int = _engine_option(ParallelConfig, "tensor_parallel_size")
    pipeline_parallel_size: int = _engine_option(ParallelConfig, "pipeline_parallel_size")
    stage_layers: tuple[int, ...] | None = _engine_option(ParallelConfig, "stage_layers")
    ranks: str | None = _engine_option(Processes, "ranks")
    url: str | None = _http_option(None, "Address of an OpenAI-compatible server.")
    prompts: str = _http_option("ids", "Prompts to send: ids, or text for servers that take no token ids.")
    vocab_size: int | None = _http_option(
        None, "Token ids sent are below it.", Integer(1), show_default="the server's or the tokenizer's, or else 1000"
    )
    max_concurrency: int | None = _http_option(
        None, "Maximum concurrent requests; delay caused by the cap counts as latency.", Integer(1)
    )
    drain_limit_s: float = _http_option(
        600.0, "Seconds after the last arrival until unfinished requests are aborted.", metavar="SECONDS"
    )
    warmup: int = _http_option(0, "Short requests before the clock starts, not recorded.", Integer(0))
    endpoint: str = _http_option("completions", "completions, or chat, which needs --prompts text.")
    ignore_eos: bool = _http_option(
        True,
        "Let the model end its outputs, for servers that refuse the field.",
        flag="--no-ignore-eos",
        parse=_parse_no_ignore_eos,
    )
    """True asks the server to generate as many tokens as the trace has."""
    extra_body: Mapping[str, Any] = _http_option(
        {}, "Merged into every request; null removes a field.", parse=parse_extra_body, metavar="JSON"
    )
    settings: Mapping[str, Any] = option(
        {},
        "Option of the engine or the policy.",
        flag="--set",
        parse=parse_settings,
        metavar="KEY=VALUE",
        backends=("sim", "engine"),
    )

    def __post_init__(self) -> None:
        if not self.policy and self.backend != "http":
            object.__setattr__(self, "policy", "fastserve")
        check_options(self)

    @property
    def source(self) -> ModelSource:
        """The model of a real engine. Dummy weights have the same seed in every run."""
        return ModelSource(self.model or "", self.load_format, self.device, self.dtype)

    @property
    def parallel(self) -> ParallelConfig:
        """How a real engine divides the model over ranks."""
        return ParallelConfig(self.tensor_parallel_size, self.pipeline_parallel_size, self.stage_layers)


def check_history(config: RunConfig) -> None:
    """Raise ConfigError for a history without requests or without a trace, or if the policy learns nothing from it."""
    if config.history is None:
        if config.history_requests:
            raise ConfigError(
                f"--history-requests {config.history_requests} needs --history: the trace to take them from"
            )
        return
    if not config.history_requests:
        raise ConfigError(
            f"--history {config.history!r} needs --history-requests: how many of its requests, at least 1"
        )
    if not find_policy(config.policy).learns:
        learning = ", ".join(name for name, policy in list_policies().items() if policy.learns) or "none"
        raise ConfigError(
            f"policy {config.policy!r} learns nothing from finished requests; --history applies to: {learning}"
        )


def backend_options(config: RunConfig) -> dict[str, Any]:
    """Return the fields of the configuration that its backend takes."""
    taken = {field.name for field, known in _options() if config.backend in (known.backends or BACKENDS)}
    return {name: value for name, value in asdict(config).items() if name in taken}


def check_backend_options(config: RunConfig) -> None:
    """Raise ConfigError for an option that differs from its default and that the backend does not take."""
    defaults = RunConfig()
    for field, known in _options():
        is_default = getattr(config, field.name) == getattr(defaults, field.name)
        if not is_default and config.backend not in (known.backends or BACKENDS):
            raise ConfigError(f"{flag_of(field.name, known)} applies to --backend {' or '.join(known.backends)} only")


def command_of(config: RunConfig) -> str:
    """The command line of `fastbench run` that repeats the run, with every option that differs from its default."""
    defaults, words = RunConfig(), ["fastbench", "run"]
    for field, known in _options():
        value, flag = getattr(config, field.name), flag_of(field.name, known)
        if value == getattr(defaults, field.name):
            continue
        if isinstance(value, bool):  # A flag that takes no value.
            words.append(flag)
        elif field.name == "settings":
            words += [word for name, each in value.items() for word in (flag, f"{name}={_as_text(each)}")]
        else:
            words += [flag, _as_text(value)]
    return shlex.join(words)


def _as_text(value: Any) -> str:
    """A value as it is given on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, bool | Mapping) else str(value)


def _options() -> Iterator[tuple[Field[Any], Option]]:
    for field in fields(RunConfig):
        known = described(field)
        assert known is not None
        yield field, known

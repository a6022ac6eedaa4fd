"""What determines a run: the backend, the workload, the policy, and the options that each backend takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fastserve.core.checks import require_int
from fastserve.core.errors import ConfigError
from fastserve.policies.discovery import find_policy, list_policies

BACKENDS = ("sim", "engine", "http")
SAME_TRACE = "same"
"""As a history: the run's own trace."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run. `settings` are the `--set` options: of the engine or of the policy."""

    backend: str = "sim"
    policy: str = ""
    """Empty: `fastserve`, or over HTTP what the server says of itself."""
    trace: str = "sharegpt"
    arrivals: str = "poisson"
    rate: float | None = None
    num_requests: int = 400
    seed: int = 0
    history: str | None = None
    """Trace of requests that finished before the run, whose lengths a policy that learns is taught; `same` is the run's
    own; None: it starts knowing nothing."""
    history_requests: int = 0
    """How many those are."""
    profile: str | None = None
    model: str | None = None
    """Directory or preset; over HTTP the name it is served under, None for the first."""
    device: str = "cpu"
    dtype: str = "float32"
    load_format: str = "auto"
    tokenizer: str | None = None
    torch_threads: int | None = None
    """Threads torch computes with; None leaves it its own choice."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    stage_layers: tuple[int, ...] | None = None
    """Layers of each stage; None: as many as give each the same weight."""
    ranks: str | None = None
    """HOST:PORT at which the engine waits for ranks that torchrun starts; None: it starts them itself."""
    url: str | None = None
    """Address of the server that is driven over HTTP."""
    prompts: str = "ids"
    """What is sent over HTTP as a prompt: token "ids", or the "text" that the tokenizer makes of them."""
    vocab_size: int | None = None
    """Token ids sent over HTTP are below it. None: what server and tokenizer say, or else 1,000."""
    max_concurrency: int | None = None
    """Requests under way over HTTP at a time; None: all that are due."""
    drain_limit_s: float = 600.0
    """How long after the last scheduled arrival requests over HTTP may take before they are aborted."""
    warmup: int = 0
    """Short requests over HTTP before the clock starts."""
    endpoint: str = "completions"
    """What requests over HTTP are: "completions", or "chat" with a message of text each."""
    ignore_eos: bool = True
    """Whether a server over HTTP is asked to generate as many tokens as the trace has, whatever the model does."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Merged into every request over HTTP; null removes a field."""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.policy and self.backend != "http":
            object.__setattr__(self, "policy", "fastserve")


_TAKEN_BY = {
    "profile": ("sim", "engine"),
    "settings": ("sim", "engine"),
    "history": ("sim", "engine"),
    "history_requests": ("sim", "engine"),
    "model": ("engine", "http"),
    **dict.fromkeys(
        (
            "device", "dtype", "load_format", "torch_threads", "tensor_parallel_size", "pipeline_parallel_size",
            "stage_layers", "ranks",
        ),
        ("engine",),
    ),
    **dict.fromkeys(
        (
            "url", "prompts", "vocab_size", "max_concurrency", "drain_limit_s", "warmup", "endpoint", "ignore_eos",
            "extra_body",
        ),
        ("http",),
    ),
}  # fmt: skip
"""Which backends take what not all of them do."""
_OPTION_OF = {"settings": "set", "ignore_eos": "no-ignore-eos"}
"""Options that are not called as what they set."""


def check_history(config: RunConfig) -> None:
    """Raise ConfigError for a history of no requests or of no trace, and for one that the policy would not learn of."""
    require_int("history_requests", config.history_requests, 0)
    if config.history is None:
        if config.history_requests:
            raise ConfigError(f"--history-requests {config.history_requests} needs --history: the trace they are of")
        return
    if not config.history_requests:
        raise ConfigError(f"--history {config.history} needs --history-requests: how many of its requests, at least 1")
    if not find_policy(config.policy).learns:
        learning = ", ".join(name for name, policy in list_policies().items() if policy.learns) or "none"
        raise ConfigError(
            f"policy {config.policy!r} learns nothing from finished requests; --history applies to: {learning}"
        )


def backend_options(config: RunConfig) -> dict[str, Any]:
    """Return the fields of the configuration that its backend takes."""
    return {name: value for name, value in asdict(config).items() if config.backend in _TAKEN_BY.get(name, BACKENDS)}


def check_backend_options(config: RunConfig) -> None:
    """Raise ConfigError for an option that differs from its default and that the backend does not take."""
    defaults = RunConfig()
    for name, backends in _TAKEN_BY.items():
        if config.backend not in backends and getattr(config, name) != getattr(defaults, name):
            option = _OPTION_OF.get(name, name.removesuffix("_s").replace("_", "-"))
            raise ConfigError(f"--{option} applies to --backend {' or '.join(backends)} only")

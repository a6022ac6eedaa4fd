"""What is served: an engine with its name and its tokenizer, real or simulated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from hashlib import sha256
from typing import Any

from fastserve import __version__
from fastserve.core.clock import WallClock
from fastserve.core.config import EngineOptions
from fastserve.core.countable_tokens import StandIns, countable_tokens
from fastserve.core.errors import ConfigError
from fastserve.core.generation_config import GenerationConfig
from fastserve.core.request import SamplingParams
from fastserve.core.tokenizer import load_tokenizer, tokenizer_directory
from fastserve.engine import Engine
from fastserve.latency import Profile, load_profile
from fastserve.server.http.log import logger
from fastserve.server.options import ModelOptions
from fastserve.server.text.codec import TextCodec
from fastserve.simulation import SimulatedExecutor, simulated_engine


@dataclass(frozen=True)
class ServedModel:
    """An engine and what a server says of it."""

    name: str
    engine: Engine
    codec: TextCodec
    vocab_size: int | None
    """Token ids are below this; None in a simulation, which accepts any."""
    close: Callable[[], None]
    aliases: tuple[str, ...] = ()
    """Further names that clients may use."""
    generation_config: GenerationConfig = field(default_factory=GenerationConfig)
    """Defaults of sampling for requests that leave it out."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names that clients may use."""
        return (self.name, *self.aliases)

    @cached_property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint. It differs if the software, the model or the engine's sizes differ."""
        engine = self.engine
        settings = (self.name, self.policy, engine.scheduler.config, engine.kv.config, engine.max_model_len)
        return f"fastserve-{__version__}-{sha256(repr(settings).encode()).hexdigest()[:8]}"

    def stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        """Return the tokens that end an output for its client, without the model's own ends of sequence."""
        own = () if params.ignore_eos else self.engine.eos_token_ids
        return frozenset(params.stop_token_ids) - frozenset(own)

    @property
    def policy(self) -> str:
        """Name of the scheduling policy."""
        return self.engine.scheduler.policy.name


def load_served_model(options: ModelOptions) -> ServedModel:
    """Build the model that the options describe. Raises what `LLM` and `simulated_engine` raise."""
    return _simulated(options) if options.backend == "sim" else _real(options)


def _simulated(options: ModelOptions) -> ServedModel:
    assert options.profile is not None
    directory = tokenizer_directory(None, options.tokenizer)
    return simulated_model(
        options.served_names or (options.profile,),
        load_profile(options.profile),
        options.policy,
        options.policy_options,
        options.engine,
        None if directory is None else load_tokenizer(directory),
    )


def simulated_model(
    names: Sequence[str],
    profile: Profile,
    policy: str,
    policy_options: Mapping[str, Any] | None,
    options: EngineOptions,
    tokenizer: Any = None,
) -> ServedModel:
    """Return a simulation in real time, with the context of the profile's model, served under `names`.

    Each generated token has a text that is one token again; without a tokenizer the tokens are 0, 1, 2 and so on.
    Raises ConfigError for an unknown policy or option, and for a tokenizer without such tokens.
    """
    if options.max_model_len is None:
        options = replace(options, max_model_len=profile.max_model_len)
    codec, token_ids = TextCodec(), list[int]()
    if tokenizer is not None:
        token_ids = countable_tokens(tokenizer.backend_tokenizer)
        if not token_ids:
            raise ConfigError(
                "the tokenizer has no tokens whose text is one token again, and a simulation generates only such "
                "tokens; give another --tokenizer, or builtin or none"
            )
        codec = TextCodec(tokenizer, StandIns(tokenizer.backend_tokenizer, None))
    engine = simulated_engine(profile, policy, policy_options, options, WallClock(), token_ids)
    name, *aliases = names
    return ServedModel(name, engine, codec, None, partial(_close_simulation, engine, profile.name), tuple(aliases))


def _close_simulation(engine: Engine, profile: str) -> None:
    """Close the executor, and warn of time outside the range that the profile was measured in."""
    assert isinstance(engine.executor, SimulatedExecutor)
    engine.executor.close()
    guard = engine.executor.range_guard
    if guard is not None and (warning := guard.outside.warning(profile)):
        logger.warning(warning)


def _real(options: ModelOptions) -> ServedModel:
    from fastserve.llm import LLM
    from fastserve.runtime.worker.devices import set_threads

    set_threads(options.processes.torch_threads)
    llm = LLM(
        **asdict(options.source),
        **asdict(options.parallel),
        **asdict(options.engine),
        ranks=options.processes.ranks,
        policy=options.policy,
        policy_options=options.policy_options,
        profile=options.profile,
        tokenizer=options.tokenizer,
        generation_config=options.generation_config,
    )
    name, *aliases = options.served_names or (llm.model_config.name,)
    return ServedModel(
        name,
        llm.engine,
        TextCodec(llm.tokenizer, llm.stand_ins),
        llm.model_config.vocab_size,
        llm.close,
        tuple(aliases),
        llm.generation_config,
    )

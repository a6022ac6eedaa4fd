"""Configuration as plain frozen data, checked when it is made. No torch: a simulation imports this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fastserve.core.checks import Integer, OneOf, Positive, require_int
from fastserve.core.errors import ConfigError
from fastserve.core.options import check_options, option

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def dtype_bytes(dtype: str) -> int:
    """Bytes of one number of this type; ConfigError for a type we do not run."""
    try:
        return _DTYPE_BYTES[dtype]
    except KeyError:
        raise ConfigError(f"unknown dtype {dtype!r}; known: {', '.join(_DTYPE_BYTES)}") from None


def _check_dtype(_: str, dtype: str) -> None:
    dtype_bytes(dtype)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Architecture of a decoder-only model: everything needed to size its cache and to build it with dummy weights."""

    name: str
    architecture: Literal["opt", "llama", "qwen3"]
    """`qwen3` is `llama` with norms of queries and keys; the engine does not run it, profiles know it."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_model_len: int
    """Longest prompt + output in tokens (position embeddings of OPT, `max_position_embeddings` of Llama)."""
    tie_word_embeddings: bool = True
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    """Llama 3 frequency scaling in Hugging Face's keys, or None."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a text; chat models have several."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model {self.name}: {self.num_heads} attention heads do not divide into {self.num_kv_heads} KV heads"
            )

    def kv_bytes_per_token(self, dtype: str = "float16") -> int:
        """Bytes of key and value cache one token takes over all layers (819,200 for OPT-13B in fp16)."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes(dtype)

    def num_parameters(self) -> int:
        """Weights of the model, tied embeddings counted once; biases and norms are left out (below 0.1 %)."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        if self.architecture == "opt":
            embeddings += self.max_model_len * self.hidden_size
        return self.num_layers * self.layer_parameters() + embeddings

    def layer_parameters(self) -> int:
        """Weights of one layer, without biases and norms."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = (2 if self.architecture == "opt" else 3) * self.hidden_size * self.intermediate_size
        return attention + mlp


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Size of the paged KV cache, in blocks of `block_size` tokens on the GPU and in host memory."""

    num_gpu_blocks: int
    num_host_blocks: int
    block_size: int = 16
    bytes_per_token: int = 0
    """Bytes one token's keys and values take over all layers; prices a swap."""
    prefix_caching: bool = False
    """Whether a dropped cache can be found again, as far as its blocks were not given out since."""

    def __post_init__(self) -> None:
        for name, least in (("num_gpu_blocks", 1), ("num_host_blocks", 0), ("block_size", 1), ("bytes_per_token", 0)):
            require_int(name, getattr(self, name), least)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: what a transfer moves at the least."""
        return self.block_size * self.bytes_per_token


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits every policy obeys."""

    max_batch_size: int
    token_budget: int
    """Prompt tokens one iteration may prefill; a longer prompt is scheduled alone."""
    pipeline_depth: int = 1
    """Iterations that may be in flight at a time."""

    def __post_init__(self) -> None:
        require_int("max_batch_size", self.max_batch_size, 1)
        require_int("token_budget", self.token_budget, 1)
        require_int("pipeline_depth", self.pipeline_depth, 1)

    @property
    def num_places(self) -> int:
        """Requests that can be served at a time: a batch for every iteration in flight."""
        return self.pipeline_depth * self.max_batch_size


@dataclass(frozen=True)
class ModelSource:
    """Which model, with which weights, on which device. ConfigError for a value out of range."""

    model: str = option("", "Model directory or preset.")
    load_format: str = option(
        "auto", "auto, or dummy for random weights, which a preset needs.", OneOf(("auto", "dummy"))
    )
    device: str = option("cpu", "cpu or cuda.")
    dtype: str = option("float32", "float32, bfloat16 or float16.", _check_dtype)
    seed: int = option(0, "Seed of dummy weights.")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Processes:
    """Which processes compute, with how many threads. ConfigError for a value out of range."""

    ranks: str | None = option(
        None,
        "Address at which to wait for ranks that torchrun starts.",
        metavar="HOST:PORT",
        show_default="start them here",
    )
    torch_threads: int | None = option(
        None, "Threads that torch computes with.", Integer(1, 1024), show_default="torch's choice"
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of an engine, the same for every policy. Defaults are the FastServe artifact's.

    The builder of an engine replaces None: `simulated_engine` by the profile's size, `LLM` by what memory allows.
    ConfigError for a value out of range.
    """

    max_batch_size: int = option(16, "Most requests of an iteration.", Integer(1))
    token_budget: int = option(2048, "Most prompt tokens of an iteration.", Integer(1))
    block_size: int = option(16, "Tokens per cache block.", Integer(1))
    num_gpu_blocks: int | None = option(
        None, "Cache blocks on the device.", Integer(1), show_default="for a full batch of full contexts"
    )
    num_host_blocks: int | None = option(None, "Cache blocks in host memory.", Integer(0))
    swap_space_gib_per_gpu: float | None = option(
        None,
        "GiB (2**30 bytes) of host memory that each GPU swaps its part of a cache to; instead of num_host_blocks.",
        Positive(),
        show_default="56 in simulations, as the artifact's scripts",
    )
    """Of each rank, where ranks are processes on a CPU."""
    max_model_len: int | None = option(None, "Longest prompt + output in tokens.", Integer(2))
    """A real engine is bounded by its model as well, a simulation is not."""
    host_link_gb_per_s: float | None = option(
        None, "Simulations only: bandwidth between GPU and host memory in each direction, in 1e9 bytes/s.", Positive()
    )
    """Over all GPUs."""
    prefix_caching: bool = option(
        False, "Find a dropped cache again, as far as its blocks were not reused, instead of recomputing it."
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.num_host_blocks is not None and self.swap_space_gib_per_gpu is not None:
            raise ConfigError(
                f"num_host_blocks={self.num_host_blocks} and swap_space_gib_per_gpu={self.swap_space_gib_per_gpu:g} "
                "both say how large the host pool is; give one of them"
            )

    def host_blocks(self, rank_bytes_per_token: int) -> int | None:
        """Blocks of the host pool that were asked for; None if neither option says.

        `rank_bytes_per_token` is what a token's cache takes on the rank with the largest part of it, whose space is
        the first to be full.
        """
        if self.swap_space_gib_per_gpu is None:
            return self.num_host_blocks
        return int(self.swap_space_gib_per_gpu * 2**30 // (self.block_size * rank_bytes_per_token))

    def scheduler_config(self, pipeline_depth: int = 1) -> SchedulerConfig:
        """Return the limits that the scheduler obeys."""
        return SchedulerConfig(self.max_batch_size, self.token_budget, pipeline_depth)

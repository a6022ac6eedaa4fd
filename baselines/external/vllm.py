"""vLLM's own server: command and environment variables that start it with options comparable to ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_NULL_BLOCK = 1
"""vLLM keeps one block of its pool for padding."""
_CPU_CACHE_GIB = 1
"""vLLM requires this bound on a CPU; the number of blocks decides how much memory is used."""


@dataclass(frozen=True)
class VllmServer:
    """`vllm serve` of a model folder, at 127.0.0.1, and the options that differ from vLLM's defaults.

    Requests share no prefixes and are not logged. Nothing is downloaded, and no usage statistics are sent.
    """

    environment: Path
    """The virtual environment in which vLLM is installed."""
    model: Path
    port: int
    device: str
    """cpu or cuda: for which vLLM was built."""
    dtype: str
    max_batch_size: int
    token_budget: int
    """Most tokens of an iteration; at least `max_model_len`, unless prompts are chunked."""
    block_size: int
    num_blocks: int
    """Cache blocks for requests."""
    max_model_len: int
    chunked_prefill: bool = False
    """Whether a prompt may be split at the token budget."""
    threads: int | None = None
    """Computing threads on a CPU, not bound to cores. None: vLLM's choice, bound to cores."""

    @property
    def url(self) -> str:
        """At which the server answers."""
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """Program and arguments."""
        options = {
            "host": "127.0.0.1",
            "port": self.port,
            "served-model-name": self.model.name,
            "dtype": self.dtype,
            "max-num-seqs": self.max_batch_size,
            "max-num-batched-tokens": self.token_budget,
            "max-model-len": self.max_model_len,
            "block-size": self.block_size,
            "num-gpu-blocks-override": self.num_blocks + _NULL_BLOCK,
            "generation-config": "vllm",
        }
        switches = [
            "--enable-chunked-prefill" if self.chunked_prefill else "--no-enable-chunked-prefill",
            "--no-enable-prefix-caching",
            "--no-enable-log-requests",
            "--disable-uvicorn-access-log",
        ]
        program = [str(self.environment / "bin" / "vllm"), "serve", str(self.model)]
        return program + [text for name, value in options.items() for text in (f"--{name}", str(value))] + switches

    def variables(self) -> Mapping[str, str | None]:
        """Environment variables to add; None removes a variable."""
        own: dict[str, str | None] = {
            "PYTHONPATH": None,
            "VLLM_CACHE_ROOT": str(self.environment / "cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if self.device == "cpu":
            own["VLLM_CPU_KVCACHE_SPACE"] = str(_CPU_CACHE_GIB)
            if self.threads is not None:
                own |= {"OMP_NUM_THREADS": str(self.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        return own

"""vLLM's own server: the command and the environment variables that start it, comparable with ours. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_NULL_BLOCK = 1
"""vLLM keeps one block of its pool for padding."""
_CPU_CACHE_GIB = 1
"""A bound that vLLM wants to know on a CPU; how much is taken, the number of blocks decides."""


@dataclass(frozen=True)
class VllmServer:
    """`vllm serve` of a model folder, at 127.0.0.1, as far as it is not vLLM's default.

    Prefixes are never shared between requests, requests are not logged, and nothing is fetched from or told to anyone.
    """

    environment: Path
    """The virtual environment that vLLM is installed in."""
    model: Path
    port: int
    device: str
    """cpu or cuda: which vLLM that is."""
    dtype: str
    max_batch_size: int
    token_budget: int
    """Most tokens of an iteration. At least `max_model_len`, unless prompts are chunked."""
    block_size: int
    num_blocks: int
    """That requests can have."""
    max_model_len: int
    chunked_prefill: bool = False
    """Whether a prompt may be cut where the budget ends."""
    threads: int | None = None
    """That compute, on a CPU; not bound to cores. None: vLLM's choice, bound to cores."""

    @property
    def url(self) -> str:
        """Where it answers."""
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
        """Of its environment, to be set beside what is there; None removes one."""
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

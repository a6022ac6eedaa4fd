"""LLM: the offline interface. A real engine on this machine, from a model directory or a preset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastserve.clock import WallClock
from fastserve.config import CacheConfig, EngineOptions, ModelConfig, dtype_bytes
from fastserve.engine import Arrival, Engine
from fastserve.errors import ConfigError
from fastserve.executor.local import LocalExecutor
from fastserve.job import Job, RequestMetrics
from fastserve.kvcache import KVCacheManager
from fastserve.latency import LatencyModel, load_profile
from fastserve.latency.profiler import Grid, fit, measure
from fastserve.models import load_config
from fastserve.options import build_options
from fastserve.presets import PRESETS, preset
from fastserve.request import Request, SamplingParams
from fastserve.scheduler import find_policy
from fastserve.worker import Worker
from fastserve.worker.memory import available_bytes
from fastserve.worker.probe import WorkerProbe

_CPU_CACHE_SHARE, _GPU_CACHE_SHARE, _PINNED_SHARE = 0.2, 0.85, 0.5
"""Most of the free memory a pool takes where its size is not given; the last is of the host's, beside a GPU."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one request produced."""

    request_id: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    """Generated tokens, without the prompt; empty if the request was rejected."""
    text: str | None
    """Decoded by the model directory's tokenizer; None without one."""
    error: str
    """Why the request was rejected; empty otherwise."""
    metrics: RequestMetrics


class LLM:
    """A model, a policy and an engine.

    Args:
        model: a directory in Hugging Face format, or the name of a preset (architecture only).
        load_format: "auto" reads the directory's weights; "dummy" makes seeded random ones, which a preset needs.
        policy: a scheduling policy's name; `policy_options` are its options.
        device: "cpu" or "cuda".
        dtype: "float32", "bfloat16" or "float16".
        block_size: tokens per cache block.
        num_gpu_blocks: blocks on the device. None: room for a full batch of full contexts, at most a fifth of the
            free memory (on a GPU, 85 % of what the weights leave).
        num_host_blocks: blocks in host memory for swapped caches. None: as many as on the device (for a GPU at most
            half the host's free memory).
        max_batch_size: requests per iteration.
        token_budget: prompt tokens per iteration.
        max_model_len: bound on prompt + output, below the model's own.
        host_link_gb_per_s: None; a simulation can be told the speed of its link to host memory, a machine cannot.
        tensor_parallel_size: 1; larger is not implemented yet.
        pipeline_parallel_size: 1; larger is not implemented yet.
        seed: of dummy weights.
        profile: a latency profile for policies that need one. None: measured here, in a few seconds.
        worker: an existing one of the same model, device, dtype and block size, with pools at least as large; `seed`
            and `load_format` are then its own. Engines may use it one after the other. None: a new one is made.

    Raises ConfigError for what is unknown, out of range or too large for memory, CheckpointError for a bad directory.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        load_format: str = "auto",
        policy: str = "fastserve",
        policy_options: Mapping[str, Any] | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        block_size: int = 16,
        num_gpu_blocks: int | None = None,
        num_host_blocks: int | None = None,
        max_batch_size: int = 16,
        token_budget: int = 2048,
        max_model_len: int | None = None,
        host_link_gb_per_s: float | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        seed: int = 0,
        profile: str | None = None,
        worker: Worker | None = None,
    ) -> None:
        for name, size in (
            ("tensor_parallel_size", tensor_parallel_size),
            ("pipeline_parallel_size", pipeline_parallel_size),
        ):
            if size != 1:
                raise ConfigError(f"{name}={size!r}: only 1 is implemented so far")
        if host_link_gb_per_s is not None:
            raise ConfigError(
                f"host_link_gb_per_s={host_link_gb_per_s!r}: for simulations only, here the machine's link is what it "
                "is; leave it out"
            )
        options = EngineOptions(
            max_batch_size, token_budget, block_size, num_gpu_blocks, num_host_blocks, max_model_len
        )
        policy_class = find_policy(policy)
        policy_settings = build_options(policy_class.Options, policy_options or {}, f"policy {policy!r}")
        self.model_config, model_dir = resolve_model(model, load_format)
        if worker is not None:
            num_gpu_blocks = num_gpu_blocks or worker.gpu_cache.shape[0]
            num_host_blocks = worker.host_cache.shape[0] if num_host_blocks is None else num_host_blocks
        num_gpu_blocks = num_gpu_blocks or default_num_blocks(self.model_config, options, device, dtype)
        if num_host_blocks is None:
            num_host_blocks = default_num_host_blocks(self.model_config, num_gpu_blocks, block_size, device, dtype)
        cache = CacheConfig(
            num_gpu_blocks=num_gpu_blocks,
            num_host_blocks=num_host_blocks,
            block_size=block_size,
            bytes_per_token=self.model_config.kv_bytes_per_token(dtype),
        )
        latency: LatencyModel | None = load_profile(profile).latency if profile else None
        context = min(self.model_config.max_model_len, max_model_len or self.model_config.max_model_len)
        if worker is not None:
            worker.require(self.model_config, cache, device, dtype)
            self.worker = worker
        else:
            self.worker = Worker(
                self.model_config,
                num_gpu_blocks=cache.num_gpu_blocks,
                num_host_blocks=cache.num_host_blocks,
                block_size=block_size,
                device=device,
                dtype=dtype,
                seed=seed,
                model_dir=model_dir,
                max_batch_size=max_batch_size,
                max_model_len=context,
            )
            self._warm_up(context, options)
        if latency is None and policy_class.needs_latency:
            probe, grid = WorkerProbe(self.worker), Grid.for_model(context, max_batch_size, quick=True)
            latency = fit(measure(probe.iteration_time, grid.shapes, 1))
        clock, kv = WallClock(), KVCacheManager(cache)
        self.engine = Engine(
            policy_class(options.scheduler_config(), kv, latency or NoLatency(), policy_settings),
            LocalExecutor(self.worker, kv, clock),
            kv,
            clock,
            max_model_len=context,
            eos_token_ids=self.model_config.eos_token_ids,
        )
        self._tokenizer = _load_tokenizer(model_dir)
        self._num_requests = 0

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prompt_token_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[RequestOutput]:
        """Serve all prompts, which arrive now, and return their outputs in order.

        Give `prompts` as text (needs a tokenizer in the model directory) or `prompt_token_ids`. One SamplingParams
        serves all. A prompt that could never be served has its reason in `error`; the others are served.
        """
        token_ids = self._token_ids(prompts, prompt_token_ids)
        params = SamplingParams() if sampling_params is None else sampling_params
        every = [params] * len(token_ids) if isinstance(params, SamplingParams) else list(params)
        if len(every) != len(token_ids):
            raise ConfigError(f"{len(token_ids)} prompts but {len(every)} sampling_params")
        now = self.engine.clock.now()
        arrivals = []
        for ids, one in zip(token_ids, every, strict=True):
            arrivals.append(Arrival(Request.from_tokens(str(self._num_requests), now, ids), one))
            self._num_requests += 1
        return [self._output(job) for job in self.engine.run(arrivals)]

    def close(self) -> None:
        """Stop the engine's threads."""
        self.engine.executor.close()

    def _warm_up(self, context: int, options: EngineOptions) -> None:
        """Run what compiles kernels or loads them, lest the first requests wait for it.

        On a GPU, prompts of many lengths, and among decodes; libraries have kernels of their own for each.
        """
        probe, longest = WorkerProbe(self.worker), min(context - 1, options.token_budget)
        decodes = [min(64, context - 1)] * options.max_batch_size
        if self.worker.device.type == "cpu":
            probe.iteration_time([min(64, longest)], [])
        else:
            for length in sorted({min(2**i, longest) for i in range(4, 20)}):
                probe.iteration_time([length], [])
            probe.iteration_time([min(64, longest)] * 2, decodes[:1])
            probe.iteration_time([min(64, longest)], decodes)
        probe.iteration_time([], decodes)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _token_ids(
        self, prompts: str | Sequence[str] | None, prompt_token_ids: Sequence[Sequence[int]] | None
    ) -> list[list[int]]:
        if (prompts is None) == (prompt_token_ids is None):
            raise ConfigError("give either prompts or prompt_token_ids")
        if prompts is not None:
            if self._tokenizer is None:
                raise ConfigError("text prompts need a tokenizer in the model directory; give prompt_token_ids instead")
            texts = [prompts] if isinstance(prompts, str) else prompts
            return [self._tokenizer.encode(text) for text in texts]
        assert prompt_token_ids is not None
        vocab_size = self.model_config.vocab_size
        for ids in prompt_token_ids:
            wrong = [token for token in ids if not 0 <= token < vocab_size]
            if wrong or not ids:
                what = f"token id {wrong[0]}" if wrong else "an empty prompt"
                raise ConfigError(f"{what}: a prompt needs at least one token, ids from 0 to {vocab_size - 1}")
        return [list(ids) for ids in prompt_token_ids]

    def _output(self, job: Job) -> RequestOutput:
        request = job.request
        generated = request.token_ids[request.num_prompt_tokens :]
        return RequestOutput(
            request.request_id,
            request.token_ids[: request.num_prompt_tokens],
            generated,
            None if self._tokenizer is None else self._tokenizer.decode(generated, skip_special_tokens=True),
            job.error,
            job.metrics,
        )


def resolve_model(model: str | Path, load_format: str) -> tuple[ModelConfig, Path | None]:
    """Architecture, and the directory to read weights from, or None for dummy ones. ConfigError if there are none."""
    if load_format not in ("auto", "dummy"):
        raise ConfigError(f"load_format must be auto or dummy, got {load_format!r}")
    if Path(model).is_dir():
        return load_config(Path(model)), Path(model) if load_format == "auto" else None
    if str(model) not in PRESETS and ("/" in str(model) or "\\" in str(model)):
        raise ConfigError(f"model directory {str(model)!r} does not exist")
    config = preset(str(model))
    if load_format != "dummy":
        raise ConfigError(f"preset {model!r} has no weights: use load_format dummy, or give a model directory")
    return config, None


def default_num_blocks(model: ModelConfig, options: EngineOptions, device: str, dtype: str) -> int:
    """Blocks for a full batch of full contexts, or what a share of the memory allows that the weights leave."""
    context = min(model.max_model_len, options.max_model_len or model.max_model_len)
    wanted = options.max_batch_size * -(-context // options.block_size)
    free_bytes, share = available_bytes(torch.device(device)), _CPU_CACHE_SHARE
    if device.startswith("cuda"):
        free_bytes, share = free_bytes - model.num_parameters() * dtype_bytes(dtype), _GPU_CACHE_SHARE
    return max(1, min(wanted, int(share * free_bytes / (options.block_size * model.kv_bytes_per_token(dtype)))))


def default_num_host_blocks(model: ModelConfig, num_gpu_blocks: int, block_size: int, device: str, dtype: str) -> int:
    """As many blocks as on the device; beside a GPU no more than a share of the host's memory, being page-locked."""
    if not device.startswith("cuda"):
        return num_gpu_blocks
    free_bytes = available_bytes(torch.device("cpu"))
    return min(num_gpu_blocks, int(_PINNED_SHARE * free_bytes / (block_size * model.kv_bytes_per_token(dtype))))


class NoLatency:
    """Given to policies that say they do not need a latency model."""

    def iteration_time(
        self, prefill_lens: Sequence[int], decode_context_lens: Sequence[int], prefix_lens: Sequence[int] = ()
    ) -> float:
        """Raise RuntimeError."""
        raise RuntimeError("the policy asks for iteration times: its class must say needs_latency = True")


def _load_tokenizer(model_dir: Path | None) -> Any:
    if model_dir is None or not any(
        (model_dir / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
    ):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(model_dir))

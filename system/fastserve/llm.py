"""LLM: the offline interface. A real engine on this machine, from a model directory or a preset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastserve.core.clock import WallClock
from fastserve.core.config import CacheConfig, EngineOptions, ModelSource, Processes
from fastserve.core.countable_tokens import StandIns
from fastserve.core.errors import ConfigError, RankError
from fastserve.core.generation_config import load_generation_config, token_ids
from fastserve.core.options import build_options
from fastserve.core.parallel import ParallelConfig
from fastserve.core.request import Request, SamplingParams
from fastserve.core.tokenizer import load_tokenizer, tokenizer_directory
from fastserve.engine import Arrival, Engine, Executor
from fastserve.engine.outputs import RequestOutput, request_outputs
from fastserve.kvcache import KVCacheManager
from fastserve.latency import LatencyModel, load_profile
from fastserve.latency.fitting import Grid, fit, measure
from fastserve.policies.discovery import find_policy, make_scheduler
from fastserve.runtime.executors.distributed import DistributedExecutor
from fastserve.runtime.executors.local import LocalExecutor
from fastserve.runtime.executors.ranks import RankGroup
from fastserve.runtime.models.source import resolve_model
from fastserve.runtime.worker import Worker
from fastserve.runtime.worker.devices import num_threads, require_device
from fastserve.runtime.worker.probe import Probe
from fastserve.runtime.worker.protocol import RankConfig
from fastserve.runtime.worker.runner import Runner
from fastserve.runtime.worker.sizing import default_num_blocks, default_num_host_blocks


class LLM:
    """A model, a policy and an engine.

    Sizes, devices and the division over ranks have the names, defaults and meanings of `ModelSource`, `EngineOptions`
    (both in fastserve.core.config) and `ParallelConfig` (fastserve.core.parallel), and of the commands' options.

    Args:
        model: a directory in Hugging Face format, or the name of a preset (architecture only).
        load_format: "auto" reads the directory's weights; "dummy" makes seeded random ones, which a preset needs.
        policy: a scheduling policy's name; `policy_options` are its options.
        num_gpu_blocks: blocks on the device. None: room for a full batch of full contexts, at most a sixteenth of the
            memory that the weights leave, or what one full context needs if that is at most a fifth of it (on a GPU,
            85 % of what the weights leave).
        num_host_blocks: blocks in host memory for swapped caches. None: as many as on the device (for a GPU at most
            half the host's free memory).
        swap_space_gib_per_gpu: GiB of host memory for each rank's part of swapped caches; instead of num_host_blocks.
        max_model_len: bound on prompt + output, below the model's own.
        host_link_gb_per_s: None. Only a simulation takes the speed of its link to host memory as an option.
        prefix_caching: find a dropped cache again, as far as its blocks were not reused, instead of recomputing it.
        pipeline_parallel_size: stages, and batches in flight. With more than one rank in all, each rank is a process,
            with a GPU of its own on "cuda".
        ranks: HOST:PORT at which this engine waits for its ranks, which `torchrun ... -m fastserve.worker` starts on
            one machine or several. None: they are started here. Or an existing RankGroup, which stays open.
        rank_timeout_s: how long a rank that should work may be silent, or stand still, before the engine ends.
        profile: a latency profile for policies that need one. None: measured here, in a few seconds.
        worker: an existing one of the same model, device, dtype and block size, with pools at least as large; `seed`
            and `load_format` are then its own. Engines may use it one after the other. None: a new one is made.
        tokenizer: a directory with one, in Hugging Face format, "builtin" or "none". None: the model directory's, if it
            has one; for a preset the built-in one.
        generation_config: "auto" reads the model directory's generation_config.json, if there is one, for tokens that
            end an output; "none" ignores it. Its sampling defaults are for servers: here SamplingParams decide.

    Raises ConfigError for a value that is unknown, out of range or too large for memory, CheckpointError for a bad
    directory, RankError for a rank that fails, dies or hangs.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        load_format: str = ModelSource.load_format,
        policy: str = "fastserve",
        policy_options: Mapping[str, Any] | None = None,
        device: str = ModelSource.device,
        dtype: str = ModelSource.dtype,
        block_size: int = EngineOptions.block_size,
        num_gpu_blocks: int | None = EngineOptions.num_gpu_blocks,
        num_host_blocks: int | None = EngineOptions.num_host_blocks,
        swap_space_gib_per_gpu: float | None = EngineOptions.swap_space_gib_per_gpu,
        max_batch_size: int = EngineOptions.max_batch_size,
        token_budget: int = EngineOptions.token_budget,
        max_model_len: int | None = EngineOptions.max_model_len,
        host_link_gb_per_s: float | None = EngineOptions.host_link_gb_per_s,
        prefix_caching: bool = EngineOptions.prefix_caching,
        tensor_parallel_size: int = ParallelConfig.tensor_parallel_size,
        pipeline_parallel_size: int = ParallelConfig.pipeline_parallel_size,
        stage_layers: Sequence[int] | None = ParallelConfig.stage_layers,
        ranks: str | RankGroup | None = Processes.ranks,
        rank_timeout_s: float = RankConfig.timeout_s,
        seed: int = ModelSource.seed,
        profile: str | None = None,
        worker: Worker | None = None,
        tokenizer: str | Path | None = None,
        generation_config: str = "auto",
    ) -> None:
        if host_link_gb_per_s is not None:
            raise ConfigError(
                f"host_link_gb_per_s={host_link_gb_per_s!r}: for simulations only, here the machine's link is what it "
                "is; leave it out"
            )
        source = ModelSource(str(model), load_format, device, dtype, seed)
        options = EngineOptions(
            max_batch_size,
            token_budget,
            block_size,
            num_gpu_blocks,
            num_host_blocks,
            swap_space_gib_per_gpu,
            max_model_len,
            prefix_caching=prefix_caching,
        )
        parallel = ParallelConfig(
            tensor_parallel_size, pipeline_parallel_size, None if stage_layers is None else tuple(stage_layers)
        )
        policy_class = find_policy(policy)
        checked_options = build_options(policy_class.Options, policy_options or {}, f"policy {policy!r}")
        if reason := checked_options.simulation_only_reason:
            raise ConfigError(f"policy {policy!r}: {reason}")
        self.model_config, model_dir = resolve_model(model, load_format)
        directory = Path(model) if Path(model).is_dir() else None
        self.generation_config = load_generation_config(directory, generation_config)
        of_text = tokenizer_directory(directory, tokenizer)
        self.tokenizer: Any = None if of_text is None else load_tokenizer(of_text)
        """Of transformers, the built-in one, or None."""
        self.stand_ins = (
            None if self.tokenizer is None else StandIns(self.tokenizer.backend_tokenizer, self.model_config.vocab_size)
        )
        """Texts for tokens that the tokenizer does not know."""
        parallel.layers_by_stage(self.model_config)
        host_blocks = options.host_blocks(parallel.rank_kv_bytes_per_token(self.model_config, dtype))
        if ranks is None:
            require_device(device, parallel.world_size)
        context = min(self.model_config.max_model_len, max_model_len or self.model_config.max_model_len)
        latency: LatencyModel | None = load_profile(profile).latency if profile else None
        self.worker: Worker | None = None
        """The worker of an engine of one rank; None with several ranks."""
        self.ranks: RankGroup | None = None
        """The ranks of an engine of several; None with one worker."""
        self._own_ranks: RankGroup | None = None
        runner: Runner
        if parallel.world_size == 1 and ranks is None:
            runner = self.worker = worker or self._new_worker(source, options, host_blocks, context, model_dir)
        elif worker is not None:
            raise ConfigError("a worker was given for an engine of several ranks, which have their own; leave it out")
        elif isinstance(ranks, RankGroup):
            runner = self.ranks = ranks
            if ranks.config.parallel != parallel:
                raise ConfigError(
                    f"the group of ranks given has {ranks.config.parallel}, not {parallel}; start another"
                )
        else:
            threads = max(1, num_threads() // parallel.world_size) if ranks is None else None
            config = RankConfig(source, parallel, options, threads, rank_timeout_s)
            self._own_ranks = RankGroup(config, address=ranks)
            runner = self.ranks = self._own_ranks
        try:
            cache = CacheConfig(
                num_gpu_blocks=num_gpu_blocks or runner.num_gpu_blocks,
                num_host_blocks=runner.num_host_blocks if host_blocks is None else host_blocks,
                block_size=block_size,
                bytes_per_token=self.model_config.kv_bytes_per_token(dtype),
                prefix_caching=prefix_caching,
            )
            runner.require(self.model_config, cache, device, dtype)
            probe = Probe(runner)
            if worker is None and not isinstance(ranks, RankGroup):
                _warm_up(probe, device, context, options)
            if latency is None and policy_class.needs_latency:
                grid = Grid.for_model(context, max_batch_size, quick=True)
                latency = fit(measure(probe.iteration_time, grid.shapes, 1))
        except BaseException:
            self._close_ranks()
            raise
        clock, kv = WallClock(), KVCacheManager(cache)
        executor: Executor
        if self.ranks is not None:
            executor = DistributedExecutor(self.ranks, kv, clock)
        else:
            assert self.worker is not None
            executor = LocalExecutor(self.worker, kv, clock)
        self.engine = Engine(
            make_scheduler(
                policy,
                policy_options or {},
                options.scheduler_config(parallel.pipeline_parallel_size),
                kv,
                latency or NoLatency(),
            ),
            executor,
            kv,
            clock,
            max_model_len=context,
            eos_token_ids=self._eos_token_ids(),
        )
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
        serves all. A prompt that can never be served has its reason in `error`; the others are served.
        Raises RankError if a rank is lost; its `outputs` are the finished requests, and the others as failed.
        """
        token_ids = self._token_ids(prompts, prompt_token_ids)
        params = SamplingParams() if sampling_params is None else sampling_params
        every = [params] * len(token_ids) if isinstance(params, SamplingParams) else list(params)
        if len(every) != len(token_ids):
            raise ConfigError(f"{len(token_ids)} prompts but {len(every)} sampling_params")
        for one in every:
            if conflict := one.conflict(self.model_config.vocab_size, self.engine.eos_token_ids):
                raise ConfigError(conflict[1])
        now = self.engine.clock.now()
        arrivals = []
        for ids, one in zip(token_ids, every, strict=True):
            prompt = self._truncated(ids, one)
            for i in range(one.n):
                name = f"{self._num_requests}-{i}" if one.n > 1 else f"{self._num_requests}"
                params = one if one.n == 1 else replace(one, n=1, seed=one.seed + i)
                arrivals.append(Arrival(Request.from_tokens(name, now, prompt), params))
            self._num_requests += 1
        numbers = [one.n for one in every]
        try:
            jobs = self.engine.run(arrivals)
        except RankError as error:
            error.outputs = request_outputs(self.engine.last_run, numbers, self._text)
            raise
        return request_outputs(jobs, numbers, self._text)

    def _truncated(self, prompt: list[int], params: SamplingParams) -> list[int]:
        """Return the end of the prompt that `truncate_prompt_tokens` leaves."""
        most = params.truncate_prompt_tokens
        if most is None:
            return prompt
        return prompt[-(max(1, self.engine.longest_request - params.max_tokens) if most < 0 else most) :]

    def _eos_token_ids(self) -> tuple[int, ...]:
        """Return the tokens that end an output: of the configuration, generation_config.json and the tokenizer."""
        of_tokenizer = None if self.tokenizer is None else self.tokenizer.eos_token_id
        ids = (*self.model_config.eos_token_ids, *self.generation_config.eos_token_ids, *token_ids(of_tokenizer))
        return tuple(dict.fromkeys(ids))

    def close(self) -> None:
        """Stop the engine's threads, or its ranks."""
        self.engine.executor.close()
        self._close_ranks()

    def _close_ranks(self) -> None:
        if self._own_ranks is not None:
            self._own_ranks.close()

    def _new_worker(
        self,
        source: ModelSource,
        options: EngineOptions,
        num_host_blocks: int | None,
        context: int,
        model_dir: Path | None,
    ) -> Worker:
        """Make a worker for the whole model, with pools of the sizes asked for, or of those that fit."""
        model, device, dtype = self.model_config, source.device, source.dtype
        num_gpu_blocks = options.num_gpu_blocks or default_num_blocks(model, options, device, dtype)
        if num_host_blocks is None:
            num_host_blocks = default_num_host_blocks(model, num_gpu_blocks, options.block_size, device, dtype)
        return Worker(
            model,
            num_gpu_blocks=num_gpu_blocks,
            num_host_blocks=num_host_blocks,
            block_size=options.block_size,
            device=device,
            dtype=dtype,
            seed=source.seed,
            model_dir=model_dir,
            max_batch_size=options.max_batch_size,
            max_model_len=context,
        )

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
            if self.tokenizer is None:
                raise ConfigError(
                    "text prompts need a tokenizer, which this model has none of; give prompt_token_ids instead"
                )
            texts = [prompts] if isinstance(prompts, str) else prompts
            prompt_token_ids = [self.tokenizer.encode(text) for text in texts]
        assert prompt_token_ids is not None
        vocab_size = self.model_config.vocab_size
        for ids in prompt_token_ids:
            wrong = [token for token in ids if not 0 <= token < vocab_size]
            if wrong or not ids:
                what = f"token id {wrong[0]}" if wrong else "an empty prompt"
                raise ConfigError(f"{what}: a prompt needs at least one token, ids from 0 to {vocab_size - 1}")
        return [list(ids) for ids in prompt_token_ids]

    def _text(self, tokens: Sequence[int]) -> str | None:
        if self.stand_ins is None:
            return None
        text: str = self.tokenizer.decode(list(map(self.stand_ins.shown, tokens)), skip_special_tokens=True)
        return text


def _warm_up(probe: Probe, device: str, context: int, options: EngineOptions) -> None:
    """Compile and load kernels, so that the first requests do not wait for them.

    On a GPU this needs prompts of many lengths, alone and among decodes: libraries have a kernel for each.
    """
    longest = min(context - 1, options.token_budget)
    decodes = [min(64, context - 1)] * options.max_batch_size
    if device == "cpu":
        probe.iteration_time([min(64, longest)], [])
    else:
        for length in sorted({min(2**i, longest) for i in range(4, 20)}):
            probe.iteration_time([length], [])
        probe.iteration_time([min(64, longest)] * 2, decodes[:1])
        probe.iteration_time([min(64, longest)], decodes)
    probe.iteration_time([], decodes)


class NoLatency:
    """Latency model of policies that declare they need none."""

    def iteration_time(
        self, prefill_lens: Sequence[int], decode_context_lens: Sequence[int], prefix_lens: Sequence[int] = ()
    ) -> float:
        """Raise RuntimeError."""
        raise RuntimeError("the policy asks for iteration times: its class must say needs_latency = True")

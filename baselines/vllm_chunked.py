"""vLLM with chunked prefill (Agrawal et al., Sarathi-Serve, OSDI'24; vLLM 0.6's `enable_chunked_prefill`)."""

from __future__ import annotations

from dataclasses import dataclass

from baselines.vllm import WaitingAndRunning
from fastserve.core.checks import require_int
from fastserve.core.config import SchedulerConfig
from fastserve.core.errors import ConfigError
from fastserve.core.request import Request
from fastserve.kvcache import KVCacheManager
from fastserve.latency import LatencyModel
from fastserve.policies.fcfs import WATERMARK
from fastserve.scheduler import Batch, PolicyOptions, Terms, register
from fastserve.scheduler.batch import DEFAULT_TERMS


@dataclass(frozen=True)
class VLLMChunkedOptions(PolicyOptions):
    """The size of a chunk, and when a request is admitted. The defaults are vLLM 0.6's."""

    chunk_tokens: int = 512
    """Tokens of an iteration, decoded and prefilled together (never above the engine's token_budget). vLLM 0.6's
    default: prompts are then slow to finish, and no decode step waits long for one."""
    watermark: float = WATERMARK
    """Share of the GPU's blocks that an admission leaves free; vLLM's engine V1 has 0."""
    v1: bool = False
    """The rules of vLLM's engine V1, as of 0.19. A request is admitted only if all it has to compute fits the free
    blocks (`scheduler_reserve_full_isl`), though it takes them chunk by chunk. The newest running request that finds no
    block loses its own cache, and no request is admitted then; otherwise it waits with its cache for a free block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("chunk_tokens", self.chunk_tokens, 1)
        if not 0 <= self.watermark < 1:
            raise ConfigError(f"watermark must be a share from 0 to below 1, got {self.watermark!r}")


@register
class VLLMChunked(WaitingAndRunning):
    """First come, first served; every iteration decodes all running requests and fills up with chunks of prompts.

    No iteration computes more than `chunk_tokens` tokens, so a long prompt does not delay decoding. When memory runs
    out, the newest running request is dropped and recomputed, from its old place in the order.
    """

    name = "vllm-chunked"
    Options = VLLMChunkedOptions

    def __init__(
        self, config: SchedulerConfig, kv: KVCacheManager, latency: LatencyModel, options: VLLMChunkedOptions
    ) -> None:
        super().__init__(config, kv, latency, options, watermark=options.watermark)
        self.v1 = options.v1
        self.growth = Terms(or_drop=options.v1)
        """The terms on which a running request gets its next blocks."""
        self.tokens_per_iteration = min(options.chunk_tokens, config.token_budget)

    def fill(self, batch: Batch) -> bool:
        """Running requests, then waiting ones, as far as the tokens go."""
        left = self.tokens_per_iteration
        # Decoding requests go first: each needs one token, and a chunk takes what there is.
        decoding: list[Request] = []
        prompts: list[Request] = []
        for request in self.running.values():
            (decoding if request.is_decoding else prompts).append(request)
        for request in decoding:
            if not left:
                break
            if not (request.in_flight or batch.is_full) and batch.take_if_ready(request):
                left -= 1
            else:
                left -= batch.offer_chunk(request, left, self.growth)
        for request in prompts:
            if left:
                left -= batch.offer_chunk(request, left, self.growth)
        # No admission in an iteration that takes caches away: the requests that lost them come first.
        for request in () if batch.lost else self._queued.values():
            alone = not batch.requests and not self.running
            if self.v1 and not (alone or self._fits(request)):
                break
            taken = batch.offer_chunk(request, left, DEFAULT_TERMS if alone else self.admission) if left else 0
            if not taken:
                break
            left -= taken
        return True

    def _fits(self, request: Request) -> bool:
        kv = self.kv
        return kv.blocks_for(request.num_tokens) + self.watermark_blocks <= kv.num_free_gpu_blocks

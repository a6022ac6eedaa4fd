"""One simulation by our engine: a script for `peers.py`, run in a process of its own as the peers are.

Usage: `python _peer_ours.py REQUESTS.csv SETTINGS`, the settings as JSON. Prints one line of JSON.

The policy is `vllm-chunked`. With the setting `one_token_chunks_as_prompts`, an iteration is priced as the peers price
it: a last chunk of one token counts as a prompt. We price it as a decode step, which computes the same.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fastserve
from baselines.vllm_chunked import VLLMChunked
from fastserve import Request, SamplingParams
from fastserve.core.clock import VirtualClock
from fastserve.core.config import CacheConfig, SchedulerConfig
from fastserve.engine import Arrival, Engine, engine
from fastserve.kvcache import KVCacheManager
from fastserve.latency import HostLink
from fastserve.policies.discovery import make_scheduler
from fastserve.scheduler import Batch, register
from fastserve.simulation import SimulatedExecutor


class FixedTimes:
    """LatencyModel: one time for prompts, however many, and one for decode tokens, added where there are both."""

    def __init__(self, prefill_s: float, decode_s: float) -> None:
        self.prefill_s = prefill_s
        self.decode_s = decode_s
        self.shape: tuple[bool, bool] | None = None
        """Whether the next iteration has prompts and decode tokens, if that is not to be told from its lengths."""

    def iteration_time(
        self, prefill_lens: Sequence[int], decode_context_lens: Sequence[int], prefix_lens: Sequence[int] = ()
    ) -> float:
        """Seconds of one iteration."""
        prompts, decodes = self.shape or (bool(prefill_lens), bool(decode_context_lens))
        return self.prefill_s * prompts + self.decode_s * decodes

    def decode_times(self, context_lens: Sequence[int], count: int) -> np.ndarray:
        """Seconds of `count` decode iterations in a row: [count]."""
        return np.full(count, self.decode_s)


@register
class PricedAsPeers(VLLMChunked):
    """`vllm-chunked`, which tells the latency model which requests of an iteration compute a prompt."""

    name = "vllm-chunked-priced-as-peers"

    def fill(self, batch: Batch) -> bool:
        """Fill as `vllm-chunked` does, then note what is computed."""
        filled = super().fill(batch)
        assert isinstance(self.latency, FixedTimes)
        # Request.is_decoding is true of a last chunk of one token as well.
        decodes = [request.num_computed_tokens >= request.num_prompt_tokens for request in batch.requests]
        self.latency.shape = (not all(decodes), any(decodes))
        return filled


def convert(path: Path) -> list[Arrival]:
    """Read the request file."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Arrival(
                Request(str(index), float(row["arrival_s"]), int(row["prompt_tokens"])),
                SamplingParams(max_tokens=int(row["output_tokens"]), ignore_eos=True),
            )
            for index, row in enumerate(csv.DictReader(file))
        ]


def simulate(arrivals: list[Arrival], settings: dict[str, Any]) -> dict[str, Any]:
    """Run the simulation. Timed without the making of requests and engine."""
    kv = KVCacheManager(CacheConfig(settings["num_gpu_blocks"], num_host_blocks=0, block_size=settings["block_size"]))
    clock = VirtualClock()
    times = FixedTimes(settings["prefill_s"], settings["decode_s"])
    limits = SchedulerConfig(settings["max_batch_size"], settings["token_budget"])
    as_prompts = settings.get("one_token_chunks_as_prompts", False)
    policy = PricedAsPeers.name if as_prompts else VLLMChunked.name
    scheduler = make_scheduler(policy, {"chunk_tokens": settings["token_budget"]}, limits, kv, times)
    executor = SimulatedExecutor((times,), HostLink(bandwidth_bytes_per_s=1e9, latency_s=0.0), clock)
    simulated = Engine(scheduler, executor, kv, clock)
    simulated.jumps = settings.get("jumps", True) and not as_prompts
    began, began_cpu = time.perf_counter(), time.process_time()
    jobs = simulated.run(arrivals)
    answer = {
        "wall_s": time.perf_counter() - began,
        "cpu_s": time.process_time() - began_cpu,
        "version": fastserve.__version__,
        "python": sys.version.split()[0],
        "compiled": Path(engine.__file__).suffix != ".py",
        "iterations": len(simulated.iterations),
        "preemptions": sum(job.preemptions for job in jobs),
    }
    if settings["times"]:
        by_id = {job.request.request_id: job for job in jobs}
        ordered = [by_id[arrival.request.request_id] for arrival in arrivals]
        answer["first_token_s"] = [job.first_token_s for job in ordered]
        answer["finished_s"] = [job.finished_s for job in ordered]
    return answer


if __name__ == "__main__":
    print(json.dumps(simulate(convert(Path(sys.argv[1])), json.loads(sys.argv[2]))))

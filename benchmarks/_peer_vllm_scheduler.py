"""One run of vLLM's own scheduler in virtual time: a script for `vllm_scheduler.py`, in an environment that has vLLM.

Usage: `python _peer_vllm_scheduler.py REQUESTS.csv SETTINGS`, the settings as JSON. Prints one line of JSON.

Scheduler, cache manager and prefix cache are vLLM's. What takes the place of its executor computes nothing: an
iteration takes the time that a profile of ours says. Written for vLLM 0.19; other versions have other constructors.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from fastserve.latency import LatencyModel, load_profile

CONTEXT = 131_072
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
    "max_position_embeddings": CONTEXT,
    "torch_dtype": "bfloat16",
}
"""vLLM wants to know some model; nothing here depends on which."""
TOKEN = 7
"""What every request generates. Prompts are of numbers that no other request has, so that they share no prefix."""


@dataclass
class Run:
    """What came of a run. Times are in seconds."""

    iterations: list[tuple[float, float, int, int, int]] = field(default_factory=list)
    """Start, end, requests and tokens of each iteration, and the blocks free when its tokens have been taken."""
    first_token_s: dict[str, float] = field(default_factory=dict)
    finished_s: dict[str, float] = field(default_factory=dict)
    preemptions: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    most_computed: dict[str, int] = field(default_factory=dict)
    """Of each request, the most tokens that it ever had computed."""


class VirtualTime:
    """Runs vLLM's scheduler as its engine does, on a clock that jumps."""

    def __init__(self, scheduler: Scheduler, latency: LatencyModel, max_in_flight: int) -> None:
        self.scheduler = scheduler
        self.latency = latency
        self.max_in_flight = max_in_flight
        """Two with asynchronous scheduling: an iteration is decided while the one before it is computed."""
        self.now = self.device_free_at = 0.0
        self.in_flight: deque[tuple[float, float, SchedulerOutput, list[list[int]]]] = deque()
        self.run = Run()

    def serve(self, requests: list[Request]) -> Run:
        """Serve requests in order of arrival."""
        pending = deque(requests)
        while pending or self.scheduler.has_requests() or self.in_flight:
            while pending and pending[0].arrival_time <= self.now:
                self.scheduler.add_request(pending.popleft())
            output = self.scheduler.schedule() if self.scheduler.has_requests() else None
            if output is not None and output.total_num_scheduled_tokens:
                self.submit(output)
                if len(self.in_flight) < self.max_in_flight:
                    continue
            if self.in_flight:
                self.collect()
            elif pending:
                self.now = pending[0].arrival_time
        return self.run

    def submit(self, output: SchedulerOutput) -> None:
        """Compute when the iteration ends, and which requests have a token then."""
        run, cached = self.run, output.scheduled_cached_reqs
        before = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        before |= zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        run.preemptions += len(output.preempted_req_ids or ())
        run.cached_tokens += sum(before[name] for name in cached.resumed_req_ids)
        prefill_lens, prefix_lens, context_lens = [], [], []
        for name, count in output.num_scheduled_tokens.items():
            computed = before[name]
            most = run.most_computed.get(name, 0)
            run.recomputed_tokens += max(0, min(computed + count, most) - computed)
            run.most_computed[name] = max(most, computed + count)
            if count == 1 and computed:
                context_lens.append(computed + 1)
            else:
                prefill_lens.append(count)
                prefix_lens.append(computed)
        seconds = self.latency.iteration_time(prefill_lens, context_lens, prefix_lens if any(prefix_lens) else ())
        start = max(self.now, self.device_free_at)
        end = self.device_free_at = start + seconds
        names = list(output.num_scheduled_tokens)
        tokens = [[] if self.scheduler.requests[name].is_prefill_chunk else [TOKEN] for name in names]
        self.in_flight.append((start, end, output, tokens))

    def collect(self) -> None:
        """Give the scheduler the tokens of the oldest iteration in flight."""
        start, end, output, tokens = self.in_flight.popleft()
        self.now = max(self.now, end)
        names = list(output.num_scheduled_tokens)
        index = {name: place for place, name in enumerate(names)}
        self.scheduler.update_from_output(
            output, ModelRunnerOutput(req_ids=names, req_id_to_index=index, sampled_token_ids=tokens)
        )
        free = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        self.run.iterations.append((start, end, len(names), output.total_num_scheduled_tokens, free))
        for name, sampled in zip(names, tokens, strict=True):
            if sampled:
                self.run.first_token_s.setdefault(name, self.now)
                self.run.finished_s[name] = self.now


def make_scheduler(settings: dict[str, Any], folder: Path) -> Scheduler:
    """Make the scheduler as vLLM's engine does, with `settings` and else its defaults."""
    (folder / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    limits = SchedulerConfig(
        max_num_seqs=settings["max_batch_size"],
        max_num_batched_tokens=settings["token_budget"],
        max_model_len=CONTEXT,
        is_encoder_decoder=False,
        async_scheduling=settings["async_scheduling"],
    )
    cache = CacheConfig(block_size=settings["block_size"], enable_prefix_caching=True)
    model = ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="bfloat16")
    configuration = VllmConfig(scheduler_config=limits, model_config=model, cache_config=cache)
    cache.num_gpu_blocks = settings["num_gpu_blocks"]
    spec = FullAttentionSpec(settings["block_size"], num_kv_heads=1, head_size=1, dtype=torch.float32)
    blocks = KVCacheConfig(settings["num_gpu_blocks"], [], [KVCacheGroupSpec(["layer"], spec)])
    return (AsyncScheduler if settings["async_scheduling"] else Scheduler)(
        vllm_config=configuration,
        kv_cache_config=blocks,
        structured_output_manager=StructuredOutputManager(configuration),
        block_size=settings["block_size"],
    )


def read_requests(path: Path, block_size: int) -> list[Request]:
    """Read the request file; each prompt is of tokens of its own."""
    init_none_hash(sha256)
    hasher = get_request_block_hasher(block_size, sha256)
    requests, first = [], TOKEN + 1
    with path.open(encoding="utf-8", newline="") as file:
        for index, row in enumerate(csv.DictReader(file)):
            count = int(row["prompt_tokens"])
            prompt = list(range(first, first + count))
            first += count
            params = SamplingParams(max_tokens=int(row["output_tokens"]), ignore_eos=True)
            arrival = float(row["arrival_s"])
            requests.append(Request(str(index), prompt, params, None, arrival_time=arrival, block_hasher=hasher))
    return requests


def main(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Run the simulation."""
    with tempfile.TemporaryDirectory() as folder:
        scheduler = make_scheduler(settings, Path(folder))
    requests = read_requests(path, settings["block_size"])
    virtual = VirtualTime(scheduler, load_profile(settings["profile"]).latency, 1 + settings["async_scheduling"])
    run = virtual.serve(requests)
    names = [request.request_id for request in requests]
    return {
        "version": vllm.__version__,
        "iterations": run.iterations,
        "first_token_s": [run.first_token_s[name] for name in names],
        "finished_s": [run.finished_s[name] for name in names],
        "preemptions": run.preemptions,
        "recomputed_tokens": run.recomputed_tokens,
        "cached_tokens": run.cached_tokens,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]))))

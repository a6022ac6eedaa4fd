"""One simulation by sched-sim: a script for `peers.py`, run in an environment that has the package.

Usage: `python _peer_sched_sim.py REQUESTS.csv SETTINGS`, the settings as JSON. Prints one line of JSON.

The scheduler is sched-sim's chunked prefill. Two of its rules matter here:
- The iteration that ends a prompt gives the time of the first token, but does not count as a token. A request of `n`
  tokens is therefore passed on with `n - 1`; it needs `n >= 2`.
- `max_batch_size` has no effect on this scheduler. The token budget alone bounds a batch.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

LAYERS, KV_HEADS, HEAD_DIM, DTYPE_BYTES = 16, 8, 128, 2
BYTES_PER_TOKEN = 2 * LAYERS * KV_HEADS * HEAD_DIM * DTYPE_BYTES
"""A power of two, so that the number of blocks computed from GiB is exact."""


def convert(path: Path) -> list[dict[str, Any]]:
    """Read the request file; return the fields of sched-sim's requests."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {
                "request_id": str(index),
                "arrived_at": float(row["arrival_s"]),
                "prompt_tokens": int(row["prompt_tokens"]),
                "output_tokens": int(row["output_tokens"]) - 1,
            }
            for index, row in enumerate(csv.DictReader(file))
        ]


def simulate(rows: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Run the simulation. Timed without the making of requests and scheduler."""
    from sched_sim.core.event_engine import Simulator
    from sched_sim.core.request import Request
    from sched_sim.hardware.latency_model import RooflineLatencyModel
    from sched_sim.hardware.profile import HardwareProfile
    from sched_sim.memory.block_manager import BlockManager
    from sched_sim.memory.preemption import PreemptionHandler
    from sched_sim.schedulers.chunked import ChunkedPrefillScheduler

    prefill_s, decode_s = settings["prefill_s"], settings["decode_s"]

    class FixedTimes(RooflineLatencyModel):
        def compute_prefill_step_time(self, num_prefill_tokens: int) -> float:
            return prefill_s

        def compute_decode_step_time(self, batch_size: int, total_context_tokens: int) -> float:
            return decode_s

        def compute_mixed_step_time(
            self, num_prefill_tokens: int, num_decode_requests: int, total_decode_context_tokens: int
        ) -> float:
            return prefill_s + decode_s

    blocks, block_size = settings["num_gpu_blocks"], settings["block_size"]
    hardware = HardwareProfile(
        vram_gb=blocks * block_size * BYTES_PER_TOKEN / 2**30, parameter_count_billions=0, num_layers=LAYERS,
        num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype_bytes=DTYPE_BYTES,
    )  # fmt: skip
    cache = BlockManager(hardware, block_size, safety_buffer_gb=0, cpu_memory_gb=0)
    if cache.total_gpu_blocks != blocks:
        raise ValueError(f"sched-sim makes {cache.total_gpu_blocks} blocks where {blocks} are asked for")
    times = FixedTimes(hardware)
    scheduler = ChunkedPrefillScheduler(
        cache,
        times,
        PreemptionHandler(cache, times),
        max_batch_size=settings["max_batch_size"],
        max_token_budget=settings["token_budget"],
    )
    simulator = Simulator(hardware, scheduler, block_size=block_size)
    requests = [Request(**row) for row in rows]
    simulator.submit_workload(requests)
    began, began_cpu = time.perf_counter(), time.process_time()
    metrics = simulator.run()
    answer = {
        "wall_s": time.perf_counter() - began,
        "cpu_s": time.process_time() - began_cpu,
        "version": version("sched-sim"),
        "python": sys.version.split()[0],
        "iterations": len(simulator.iteration_records),
        "preemptions": metrics.preempted_requests_count,
    }
    if settings["times"]:
        answer["first_token_s"] = [request.first_token_at for request in requests]
        answer["finished_s"] = [request.completed_at for request in requests]
    return answer


if __name__ == "__main__":
    print(json.dumps(simulate(convert(Path(sys.argv[1])), json.loads(sys.argv[2]))))

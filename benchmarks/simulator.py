"""Simulated iterations per second on one core: OPT-13B on an A100-80GB, ShareGPT lengths, batch 16.

`burst`: 400 requests queued at once. `load`: 400 Poisson arrivals at 1.2 requests/s, somewhat below what the server can
carry. The cache is without limit (ample), the A100-80GB's 66,144 tokens, or the 12,000 an A100-40GB has left (short:
caches are swapped). With the paper's alpha of 0.3 s a burst is the worst case: nearly every iteration replaces the
whole batch.
"""

from __future__ import annotations

import argparse
import statistics
import time

from fastserve.core.config import EngineOptions
from fastserve.core.request import Request, SamplingParams
from fastserve.engine import Arrival
from fastserve.latency import load_profile
from fastserve.simulation import simulated_engine
from harness.workload.workload import make_workload

AMPLE = EngineOptions(num_gpu_blocks=40_000)
A100_80GB = EngineOptions()
SHORT = EngineOptions(num_gpu_blocks=750)
BURST, LOAD = ("constant", 1e6), ("poisson", 1.2)
CASES: list[tuple[str, str, dict[str, str], EngineOptions, tuple[str, float]]] = [
    ("fastserve-fcfs, burst, ample", "fastserve-fcfs", {}, AMPLE, BURST),
    ("vllm, burst, ample", "vllm", {}, AMPLE, BURST),
    ("fastserve, load, ample", "fastserve", {}, AMPLE, LOAD),
    ("fastserve, load, short", "fastserve", {}, SHORT, LOAD),
    ("fastserve, no promotion, load, short", "fastserve", {"alpha_s": "none"}, SHORT, LOAD),
    ("fastserve, burst, ample", "fastserve", {}, AMPLE, BURST),
    ("fastserve, burst, 66,144 tokens", "fastserve", {}, A100_80GB, BURST),
    ("fastserve, no promotion, burst, 66,144", "fastserve", {"alpha_s": "none"}, A100_80GB, BURST),
    ("gittins, load, ample", "gittins", {}, AMPLE, LOAD),
    ("gittins, load, short", "gittins", {}, SHORT, LOAD),
    ("gittins, burst, ample", "gittins", {}, AMPLE, BURST),
    ("gittins, burst, 66,144 tokens", "gittins", {}, A100_80GB, BURST),
]


def iterations_per_second(
    policy: str, settings: dict[str, str], options: EngineOptions, arrivals: tuple[str, float]
) -> tuple[float, float]:
    """One simulation, timed without the making of its requests. Also the TB that went to the host."""
    workload = make_workload("sharegpt", *arrivals, 400, seed=0)
    engine = simulated_engine(load_profile("a100-80g/opt-13b-tp1-swifttransformer"), policy, settings, options)
    columns = (workload.arrival_s.tolist(), workload.prompt_tokens.tolist(), workload.output_tokens.tolist())
    rows = zip(*columns, strict=True)
    requests = [
        Arrival(Request(str(i), at, prompt), SamplingParams(max_tokens=output, ignore_eos=True))
        for i, (at, prompt, output) in enumerate(rows)
    ]
    began = time.perf_counter()
    jobs = engine.run(requests)
    elapsed = time.perf_counter() - began
    return len(engine.iterations) / elapsed, sum(job.swap_out_bytes for job in jobs) / 1e12


def main() -> None:
    """Print the median rate of each case, the cases taking turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    rates: dict[str, list[float]] = {label: [] for label, *_ in CASES}
    moved = {}
    for _ in range(repeats):
        for label, policy, settings, options, arrivals in CASES:
            rate, moved[label] = iterations_per_second(policy, settings, options, arrivals)
            rates[label].append(rate)
    for label, values in rates.items():
        print(
            f"{label:40} {statistics.median(values):9,.0f} iterations/s "
            f"(median of {repeats}, best {max(values):,.0f}), {moved[label]:.2f} TB out"
        )


if __name__ == "__main__":
    main()

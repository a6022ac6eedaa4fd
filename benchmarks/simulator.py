"""Simulated iterations per second on one core: OPT-13B on an A100-80GB, batch 16, 400 requests queued at once.

`preempting` is FastServe with the paper's alpha of 0.3 s: with 400 requests waiting, nearly every iteration replaces
the whole batch. `swapping` runs the same with the cache of the profile, which then is short as well.
"""

from __future__ import annotations

import argparse
import statistics
import time

from fastserve.config import EngineOptions
from fastserve.engine import Arrival
from fastserve.latency import load_profile
from fastserve.request import Request, SamplingParams
from fastserve.simulation import simulated_engine
from harness.workload import make_workload

AMPLE = EngineOptions(num_gpu_blocks=40_000)
CASES: list[tuple[str, str, dict[str, str], EngineOptions]] = [
    ("fastserve-fcfs", "fastserve-fcfs", {}, AMPLE),
    ("vllm", "vllm", {}, AMPLE),
    ("fastserve, no promotion", "fastserve", {"alpha_s": "none"}, AMPLE),
    ("fastserve, preempting", "fastserve", {}, AMPLE),
    ("fastserve, swapping", "fastserve", {}, EngineOptions()),
]


def iterations_per_second(policy: str, settings: dict[str, str], options: EngineOptions) -> float:
    """One simulation, timed without the making of its requests."""
    workload = make_workload("sharegpt", "constant", 1e6, 400, seed=0)
    engine = simulated_engine(load_profile("a100-80g/opt-13b-tp1"), policy, settings, options)
    rows = zip(workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True)
    arrivals = [
        Arrival(Request(str(i), 0.0, prompt), SamplingParams(max_tokens=output, ignore_eos=True))
        for i, (prompt, output) in enumerate(rows)
    ]
    began = time.perf_counter()
    engine.run(arrivals)
    return len(engine.iterations) / (time.perf_counter() - began)


def main() -> None:
    """Print the median rate of each case, the cases taking turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    rates: dict[str, list[float]] = {label: [] for label, *_ in CASES}
    for _ in range(repeats):
        for label, policy, settings, options in CASES:
            rates[label].append(iterations_per_second(policy, settings, options))
    for label, values in rates.items():
        print(
            f"{label:24} {statistics.median(values):9,.0f} iterations/s (median of {repeats}, best {max(values):,.0f})"
        )


if __name__ == "__main__":
    main()

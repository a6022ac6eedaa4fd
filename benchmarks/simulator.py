"""Simulated iterations per second on one core: OPT-13B on an A100-80GB, ShareGPT lengths, batch 16.

`burst`: 400 requests queued at once. `load`: 400 Poisson arrivals at 1.2 requests/s, somewhat below what the server can
carry. The cache is without limit (ample), the A100-80GB's 66,144 tokens, or the 12,000 an A100-40GB has left (short:
caches are swapped). With the paper's alpha of 0.3 s a burst is the worst case: nearly every iteration replaces the
whole batch.

With `--time-models`: what kernel tables cost beside a fit. Llama-3.1-8B on an RTX PRO 6000, batch 128, 2,000 ShareGPT
requests, priced by its kernel tables, and by a fit to them, so that the iterations are much alike. Both take turns in
one process; the ratio is of the processor time of a run, the fit's over the tables'. `load` is 12 requests/s.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

from fastserve.core.config import EngineOptions
from fastserve.core.request import Request, SamplingParams
from fastserve.engine import Arrival
from fastserve.latency import Profile, load_profile
from fastserve.latency.fitting import Shape, fit, measure
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

LARGE = EngineOptions(max_batch_size=128)
TIME_MODEL_CASES: list[tuple[str, str, dict[str, str], EngineOptions, tuple[str, float]]] = [
    ("fastserve, load", "fastserve", {}, LARGE, ("poisson", 12.0)),
    ("fastserve, burst", "fastserve", {}, LARGE, BURST),
    ("vllm-chunked, load", "vllm-chunked", {}, LARGE, ("poisson", 12.0)),
    ("vllm-chunked, burst", "vllm-chunked", {}, LARGE, BURST),
    ("fastserve-fcfs, burst", "fastserve-fcfs", {}, LARGE, BURST),
]
KERNELS = "rtxpro6000/llama-3.1-8b-tp1"
FITTED_SHAPES: list[Shape] = [
    *(((tokens,), ()) for tokens in (16, 64, 256, 512, 1024, 2048)),
    *(((), (context,) * batch) for batch in (32, 64, 96, 128) for context in (200, 400, 600)),
]
"""Iterations like those of the runs, so that tables and fit nearly agree and the runs have as many iterations."""


def simulate(
    profile: Profile,
    policy: str,
    settings: dict[str, str],
    options: EngineOptions,
    arrivals: tuple[str, float],
    num_requests: int = 400,
) -> tuple[int, float, float]:
    """Iterations of one simulation, its processor time (s) without the making of its requests, and TB to the host."""
    workload = make_workload("sharegpt", *arrivals, num_requests, seed=0)
    engine = simulated_engine(profile, policy, settings, options)
    columns = (workload.arrival_s.tolist(), workload.prompt_tokens.tolist(), workload.output_tokens.tolist())
    rows = zip(*columns, strict=True)
    requests = [
        Arrival(Request(str(i), at, prompt), SamplingParams(max_tokens=output, ignore_eos=True))
        for i, (at, prompt, output) in enumerate(rows)
    ]
    began = time.process_time()
    jobs = engine.run(requests)
    elapsed = time.process_time() - began
    return len(engine.iterations), elapsed, sum(job.swap_out_bytes for job in jobs) / 1e12


def compare_time_models(repeats: int) -> None:
    """Print what a run takes by kernel tables and by a fit to them, and the ratio: medians, the two taking turns."""
    fitted = fit(measure(load_profile(KERNELS).stage.iteration_time, FITTED_SHAPES, repeats=1))
    for label, policy, settings, options, arrivals in TIME_MODEL_CASES:
        seconds: dict[str, list[float]] = {"tables": [], "fit": []}
        iterations = {}
        for repeat in range(repeats + 1):
            for name in ("tables", "fit") if repeat % 2 else ("fit", "tables"):
                profile = load_profile(KERNELS)  # Anew, since kernel tables keep what they have interpolated.
                if name == "fit":
                    profile = replace(profile, stage=fitted)
                iterations[name], elapsed, _ = simulate(profile, policy, settings, options, arrivals, 2000)
                if repeat:  # The first run warms up.
                    seconds[name].append(elapsed)
        ratios = sorted(of_fit / of_tables for of_tables, of_fit in zip(*seconds.values(), strict=True))
        runs = ", ".join(
            f"{name} {statistics.median(seconds[name]):.3f} s for {iterations[name]:,} iterations" for name in seconds
        )
        print(f"{label:22} {runs}, ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def main() -> None:
    """Print the median rate of each case, the cases taking turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--time-models", action="store_true", help="kernel tables beside a fit")
    arguments = parser.parse_args()
    repeats = arguments.repeats
    if arguments.time_models:
        compare_time_models(repeats)
        return
    profile = load_profile("a100-80g/opt-13b-tp1-swifttransformer")
    rates: dict[str, list[float]] = {label: [] for label, *_ in CASES}
    moved = {}
    for _ in range(repeats):
        for label, policy, settings, options, arrivals in CASES:
            iterations, seconds, moved[label] = simulate(profile, policy, settings, options, arrivals)
            rates[label].append(iterations / seconds)
    for label, values in rates.items():
        print(
            f"{label:40} {statistics.median(values):9,.0f} iterations/s "
            f"(median of {repeats}, best {max(values):,.0f}), {moved[label]:.2f} TB out"
        )


if __name__ == "__main__":
    main()

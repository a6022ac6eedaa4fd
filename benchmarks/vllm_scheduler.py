"""`vllm-chunked`, set up as vLLM 0.19, beside vLLM 0.19.0's own scheduler, on the same requests and iteration times.

vLLM's scheduler, cache manager and prefix cache run in virtual time in an environment of their own, `.venv-peers-vllm`,
which the first run installs (or --python, one that is there). No model is computed: an iteration takes the time that a
profile of ours says, in both. So what differs is what the schedulers decide.

vLLM's default on a GPU is asynchronous scheduling, which decides an iteration while the one before it is computed; ours
has no such thing. Both of vLLM's are run, so that its effect is seen.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from baselines.external.environment import SCHEDULERS, build, python_of
from baselines.external.peer import Answer, answer_of, write_request_file
from fastserve.core.config import EngineOptions
from fastserve.core.errors import FastServeError
from fastserve.latency import load_profile
from fastserve.simulation import simulated_engine
from harness.run.backends.in_process import arrivals_of
from harness.workload.workload import Workload, make_workload

ROOT = Path(__file__).parents[1]
SCRIPT = "_peer_vllm_scheduler.py"
BLOCK_SIZE = 16
CLOSE_S = 1e-9
"""Times this close are the same: sums of the same numbers in another order."""


def run_ours(workload: Workload, settings: dict[str, Any]) -> Answer:
    """Simulate by our engine. vLLM keeps one of its blocks for itself."""
    policy = {"chunk_tokens": settings["token_budget"], "watermark": 0.0, "v1": True}
    options = EngineOptions(
        max_batch_size=settings["max_batch_size"],
        token_budget=settings["token_budget"],
        block_size=BLOCK_SIZE,
        num_gpu_blocks=settings["num_gpu_blocks"] - 1,
        prefix_caching=True,
    )
    engine = simulated_engine(load_profile(settings["profile"]), "vllm-chunked", policy, options)
    rows = [job.metrics for job in engine.run(arrivals_of(workload, None))]
    return {
        "iterations": [
            (one.start_s, one.end_s, one.num_requests, one.num_scheduled_tokens, one.free_gpu_blocks)
            for one in engine.iterations
        ],
        **{name: [getattr(row, name) for row in rows] for name in ("first_token_s", "finished_s")},
        **{
            name: sum(getattr(row, name) for row in rows)
            for name in ("preemptions", "recomputed_tokens", "cached_tokens")
        },
    }


def run_vllm(python: Path, requests: Path, settings: dict[str, Any], *, async_scheduling: bool) -> Answer:
    """Run vLLM's scheduler in a process of its own. ConfigError with its last lines if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "system"), "FASTSERVE_PURE": "1"}
    command = [
        *(python, ROOT / "benchmarks" / SCRIPT, requests),
        json.dumps({**settings, "block_size": BLOCK_SIZE, "async_scheduling": async_scheduling}),
    ]
    return answer_of(command, {**environment, "VLLM_LOGGING_LEVEL": "ERROR"}, "vLLM's scheduler")


def first_difference(ours: Answer, theirs: Answer) -> str:
    """Say where the iterations of both first differ."""
    both = zip(ours["iterations"], theirs["iterations"], strict=False)
    for number, (a, b) in enumerate(both):
        if abs(a[0] - b[0]) > CLOSE_S or tuple(a[2:]) != tuple(b[2:]):
            return f"differ from iteration {number:,} on: (start, end, requests, tokens, free blocks) {a} and {b}"
    counts = len(ours["iterations"]), len(theirs["iterations"])
    return f"all {counts[0]:,} iterations alike" if counts[0] == counts[1] else f"{counts[0]:,} and {counts[1]:,}"


def line(name: str, answer: Answer, workload: Workload) -> str:
    """A row of the table: counts, and mean and P99 of each quantity in seconds."""
    first, finished = np.array(answer["first_token_s"]), np.array(answer["finished_s"])
    several = workload.output_tokens > 1
    per_token = ((finished - first)[several]) / (workload.output_tokens[several] - 1)
    counts = (answer["preemptions"], answer["recomputed_tokens"], answer["cached_tokens"], len(answer["iterations"]))
    times = (first - workload.arrival_s, per_token, finished - workload.arrival_s)
    shown = [f"{value:,}" for value in counts]
    shown += [f"{statistic:.4f}" for values in times for statistic in (values.mean(), np.percentile(values, 99))]
    return f"{name:24}" + "".join(f"{text:>11}" for text in shown)


def main() -> None:
    """Run all three, and print how they agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", default="sharegpt", help="of `fastbench traces` or KIND:FILE (default: %(default)s)")
    parser.add_argument("--arrivals", default="poisson", help="as in `fastbench run` (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=10.0, help="requests/s (default: %(default)s)")
    parser.add_argument("--num-requests", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--profile", default="rtx4090/llama-3.1-8b-tp1", help="iteration times (default: %(default)s)")
    parser.add_argument("--max-batch-size", type=int, default=256, help="max_num_seqs (default: %(default)s)")
    parser.add_argument("--token-budget", type=int, default=2048, help="max_num_batched_tokens (default: %(default)s)")
    parser.add_argument("--num-gpu-blocks", type=int, default=2588, help="as vLLM counts (default: %(default)s)")
    parser.add_argument("--python", type=Path, help="an interpreter that has vLLM 0.19.0 (default: install it)")
    arguments = parser.parse_args()
    settings = {
        name: getattr(arguments, name) for name in ("profile", "max_batch_size", "token_budget", "num_gpu_blocks")
    }
    rate = None if arguments.arrivals == "trace" else arguments.rate
    try:
        workload = make_workload(arguments.trace, arguments.arrivals, rate, arguments.num_requests, arguments.seed)
        python = arguments.python
        if python is None:
            folder = ROOT / ".venv-peers-vllm"
            python = python_of(folder)
            if not python.exists():
                build(SCHEDULERS["vllm"], folder)
        ours = run_ours(workload, settings)
        with tempfile.TemporaryDirectory() as scratch:
            requests = Path(scratch) / "requests.csv"
            write_request_file(requests, workload.prompt_tokens, workload.output_tokens, workload.arrival_s)
            answers = {
                "vLLM Scheduler": run_vllm(python, requests, settings, async_scheduling=False),
                "vLLM AsyncScheduler": run_vllm(python, requests, settings, async_scheduling=True),
            }
    except FastServeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    names = ("preempted", "recomputed", "cached", "iterations", "TTFT", "P99", "TPOT", "P99", "completion", "P99")
    print(f"{len(workload):,} requests of {arguments.trace}; means and P99 in seconds")
    print(" " * 24 + "".join(f"{name:>11}" for name in names))
    print(line("ours", ours, workload))
    for name, answer in answers.items():
        print(line(f"{name} {answer['version']}"[:24], answer, workload))
    print(f"ours and vLLM's Scheduler: {first_difference(ours, answers['vLLM Scheduler'])}")


if __name__ == "__main__":
    main()

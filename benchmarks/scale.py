"""Time and memory of long simulations: 10^4, 10^5 and 10^6 requests, from the workload to the four files.

OPT-13B on an A100-80GB with its 66,144 tokens of cache, Azure conversation lengths, batch 16. Arrivals are Poisson at
0.9 of the policy's capacity: the requests/s that finish in a run of 2,000 requests which are all there at its start.
Each run has a process of its own, so that the peak of its resident memory is its own too. Times are of the processor,
start-up included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness.run.config import RunConfig
from harness.run.runner import run

LOAD = 0.9
NUM_OF_CAPACITY = 2_000


def _config(policy: str, rate: float, num_requests: int, arrivals: str) -> RunConfig:
    return RunConfig(
        policy=policy,
        profile="a100-80g/opt-13b-tp1-swifttransformer",
        trace="azure-conv",
        arrivals=arrivals,
        rate=rate,
        num_requests=num_requests,
    )


def measure(policy: str, rate: float, num_requests: int, arrivals: str = "poisson") -> dict[str, Any]:
    """Carry out one run in this process, and measure it."""
    with tempfile.TemporaryDirectory() as folder:
        summary = run(_config(policy, rate, num_requests, arrivals), Path(folder))
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    seconds = time.process_time()
    return {
        "requests_per_s": num_requests / seconds,
        "iterations_per_s": summary["iterations"] / seconds,
        "seconds": seconds,
        "peak_mib": _peak_kib() / 1024,
        "file_mib": size / 2**20,
        "mean_jct_s": summary["mean_jct_s"],
        "capacity": summary["finished"] / summary["duration_s"],
    }


def _peak_kib() -> int:
    """Peak resident memory of this process (Linux). Other counters include that of the process which started it."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def _measure_in_process(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    measured: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return measured


def main() -> None:
    """Print a line for each policy and number of requests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", default="fastserve-fcfs,fastserve")
    parser.add_argument("--sizes", default="10000,100000,1000000")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        policy, rate, num_requests, arrivals = arguments.one
        print(json.dumps(measure(policy, float(rate), int(num_requests), arrivals)))
        return
    for policy in arguments.policies.split(","):
        capacity = _measure_in_process(policy, 1e6, NUM_OF_CAPACITY, "constant")["capacity"]
        print(f"{policy}: capacity {capacity:.3f} requests/s, arrivals at {LOAD * capacity:.3f}")
        for size in map(int, arguments.sizes.split(",")):
            found = _measure_in_process(policy, LOAD * capacity, size, "poisson")
            print(
                f"{size:9,} requests {found['requests_per_s']:9,.0f} requests/s {found['iterations_per_s']:9,.0f} "
                f"iterations/s {found['seconds']:9,.1f} s {found['peak_mib']:6,.0f} MiB, files "
                f"{found['file_mib']:6,.1f} MiB, mean JCT {found['mean_jct_s']:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()

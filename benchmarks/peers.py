"""Our simulator beside others on the same requests: first whether the results agree, then how fast each is.

The peers are sched-sim (Python) and AISimulate (compiled from Rust), each in an environment of its own,
`.venv-peers-NAME`, which the first run installs. All get the same request file, the same cache, the same limits and
constant iteration times: 1/128 s for prompts, as much for decode tokens, and the sum where an iteration has both. All
times are then sums of binary fractions, so that equal schedules give equal numbers.

The scheduler is first come, first served with chunked prefill, ours by the policy `vllm-chunked`. The cache is never
full: without room every simulator preempts by rules of its own.

Every run is a process of its own on one core. What is timed is the simulation alone: no start, no reading of requests.
Rates are per second of processor time, since other work may share the machine; wall time is printed beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from baselines.external.environment import SIMULATORS, build, python_of
from baselines.external.peer import Answer, answer_of, write_request_file
from fastserve.core.errors import ConfigError, FastServeError
from harness.workload.arrivals import AT_ONCE
from harness.workload.traces import LengthSource
from harness.workload.workload import Workload, make_workload

ROOT = Path(__file__).parents[1]
SCRIPTS = {"sched-sim": "_peer_sched_sim.py", "aisimulate": "_peer_aisimulate.py"}
OURS = "_peer_ours.py"
ITERATION_S = 2.0**-7
ARRIVALS_PER_S = 2**10
"""Arrivals are rounded down to a multiple of 1/1024 s, which is exact in seconds and in milliseconds."""
SHORTEST_OUTPUT = 2
"""sched-sim cannot express an output of one token."""
NUM_BLOCKS, BLOCK_SIZE = 100_000, 16
CLOSE_S = 1e-9


class MooncakeLike:
    """Invented lengths: log-normal with the means of Mooncake's conversation trace, 12,035 in and 343 out.

    The means are the paper's (Qin et al., FAST 2025); the spread (sigma 1) and the bounds are assumptions of ours.
    """

    description = "log-normal lengths with the means of Mooncake's conversation trace"

    def sample(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw `n` prompt and output lengths in tokens, [n] each."""
        means = np.array([12_035, 343])
        lengths = np.exp(np.log(means) - 0.5 + rng.standard_normal((n, 2))).astype(np.int64)
        return np.clip(lengths[:, 0], 1, 120_000), np.clip(lengths[:, 1], 1, 2_000)


@dataclass(frozen=True)
class Case:
    """Requests and the limits of the scheduler."""

    name: str
    lengths: str | LengthSource
    arrivals: tuple[str, float | None]
    num_requests: int
    max_batch_size: int
    token_budget: int
    peers: tuple[str, ...] = ("sched-sim", "aisimulate")

    def workload(self) -> Workload:
        """Draw the requests."""
        return make_workload(self.lengths, *self.arrivals, self.num_requests, seed=0)


CASES = (
    Case("load", "sharegpt", ("poisson", 4.0), 2_000, 512, 512),
    Case("overload", "sharegpt", ("constant", AT_ONCE), 2_000, 512, 512),
    # sched-sim's chunked prefill knows no limit on the number of requests.
    Case("overload, batch 16", "sharegpt", ("constant", AT_ONCE), 2_000, 16, 512, ("aisimulate",)),
    Case("Mooncake-like", MooncakeLike(), ("poisson", 12_031 / 3_600), 12_000, 512, 8_192),
)


@dataclass(frozen=True)
class Agreement:
    """How far two simulations agree on the times of first tokens and of completions."""

    requests: int
    equal: tuple[int, int]
    """Requests with the same first-token time, and with the same completion time."""
    close: tuple[int, int]
    """The same, within 1e-9 s."""
    largest_s: float
    """Largest difference of either time; infinite if a request got one in one simulation alone."""
    request: int | None
    """Where that is; None if there is no difference."""

    @property
    def is_complete(self) -> bool:
        """Whether every time is equal."""
        return self.equal == (self.requests, self.requests)

    def __str__(self) -> str:
        first, finished = (
            f"{equal:,} of {self.requests:,} {what} equal ({close:,} within {CLOSE_S:g} s)"
            for what, equal, close in zip(("first tokens", "completions"), self.equal, self.close, strict=True)
        )
        where = "" if self.request is None else f", of request {self.request}"
        return f"{first}, {finished}, largest difference {self.largest_s:g} s{where}"


def write_requests(workload: Workload, path: Path) -> None:
    """Write the request file: our CSV format, arrivals exact in binary, outputs of at least two tokens."""
    arrivals = np.floor(workload.arrival_s * ARRIVALS_PER_S) / ARRIVALS_PER_S
    outputs = np.maximum(workload.output_tokens, SHORTEST_OUTPUT)
    write_request_file(path, workload.prompt_tokens, outputs, arrivals)


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Agreement:
    """Compare two answers request by request."""
    equal, close, largest_s, request = [], [], 0.0, None
    for field in ("first_token_s", "finished_s"):
        differences = [_difference(a, b) for a, b in zip(ours[field], theirs[field], strict=True)]
        equal.append(differences.count(0.0))
        close.append(sum(difference <= CLOSE_S for difference in differences))
        if differences and max(differences) > largest_s:
            largest_s = max(differences)
            request = differences.index(largest_s)
    return Agreement(len(ours["finished_s"]), (equal[0], equal[1]), (close[0], close[1]), largest_s, request)


def _difference(a: float | None, b: float | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    return abs(a - b)


@dataclass(frozen=True)
class Simulator:
    """A script that simulates, and how to start it."""

    name: str
    python: Path
    script: str
    variables: Mapping[str, str | None]
    """Added to the environment; None removes a variable."""
    settings: Mapping[str, Any]
    """Added to the settings of a case."""

    def run(self, case: Case, requests: Path, *, times: bool, **more: Any) -> Answer:
        """Simulate in a new process. ConfigError with its last lines if it fails."""
        settings = {
            "max_batch_size": case.max_batch_size,
            "token_budget": case.token_budget,
            "num_gpu_blocks": NUM_BLOCKS,
            "block_size": BLOCK_SIZE,
            "prefill_s": ITERATION_S,
            "decode_s": ITERATION_S,
            "times": times,
            **self.settings,
            **more,
        }
        environment = {**os.environ, **self.variables}
        answer = answer_of(
            [self.python, str(ROOT / "benchmarks" / self.script), str(requests), json.dumps(settings)],
            {key: value for key, value in environment.items() if value is not None},
            self.name,
            f" on {case.name!r}",
        )
        if answer.get("preemptions"):
            raise ConfigError(f"{self.name} preempted {answer['preemptions']} times on {case.name!r}; none is expected")
        return answer


def install(name: str) -> Simulator | None:
    """Install the peer if it is not there; None, with the reason printed, if that fails."""
    folder = ROOT / f".venv-peers-{name}"
    try:
        if not python_of(folder).exists():
            print(f"installing {name} into {folder.name}", flush=True)
            build(SIMULATORS[name], folder)
    except FastServeError as error:
        print(f"{name} is left out, since it cannot be installed: {error}", flush=True)
        return None
    return Simulator(name, python_of(folder), SCRIPTS[name], {"PYTHONPATH": None}, {})


def our_simulators(case: Case, requests: Path) -> list[Simulator]:
    """Ours: pure Python, with and without jumps over identical iterations, and compiled if it is."""
    python, pure = Path(sys.executable), {"FASTSERVE_PURE": "1"}
    compiled = Simulator("ours, compiled", python, OURS, {"FASTSERVE_PURE": None}, {})
    found = [
        Simulator("ours, pure", python, OURS, pure, {}),
        Simulator("ours, pure, no jumps", python, OURS, pure, {"jumps": False}),
    ]
    if compiled.run(case, requests, times=False)["compiled"]:
        found += [
            compiled,
            Simulator("ours, compiled, no jumps", python, OURS, {"FASTSERVE_PURE": None}, {"jumps": False}),
        ]
    return found


def measure(case: Case, peers: Sequence[Simulator], folder: Path, repeats: int) -> dict[str, Any]:
    """Print and return the agreement and then the speed on one case."""
    requests = folder / "requests.csv"
    write_requests(case.workload(), requests)
    ours = our_simulators(case, requests)
    print(
        f"\n{case.name}: {case.num_requests:,} requests, batch {case.max_batch_size}, {case.token_budget:,} tokens an "
        f"iteration, {NUM_BLOCKS:,} blocks of {BLOCK_SIZE}",
        flush=True,
    )
    results: dict[str, Any] = {"agreement": {}, "speed": {}}
    answer = ours[0].run(case, requests, times=True)
    iterations = {one.name: answer["iterations"] for one in ours}
    versions: dict[str, str] = {}
    for one in ours[1:]:
        agreement = compare(answer, one.run(case, requests, times=True))
        if not agreement.is_complete:
            raise ConfigError(f"{one.name} differs from {ours[0].name} on {case.name!r}: {agreement}")
    as_peers = ours[0].run(case, requests, times=True, one_token_chunks_as_prompts=True)
    for peer in peers:
        theirs = peer.run(case, requests, times=True)
        versions[peer.name] = f"{theirs['version']}, Python {theirs['python']}"
        iterations[peer.name] = theirs.get("iterations", as_peers["iterations"])
        agreements = {"": compare(answer, theirs)}
        if not agreements[""].is_complete:
            agreements[", last chunks of one token priced as prompts"] = compare(as_peers, theirs)
        results["agreement"][peer.name] = {how: asdict(agreement) for how, agreement in agreements.items()}
        for how, agreement in agreements.items():
            print(f"  ours{how} beside {peer.name} ({versions[peer.name]}): {agreement}", flush=True)

    simulators = [*ours, *peers]
    turns: dict[str, list[Answer]] = {one.name: [] for one in simulators}
    for _ in range(repeats):
        for one in simulators:
            turns[one.name].append(one.run(case, requests, times=False))
    base = statistics.median(turn["cpu_s"] for turn in turns[ours[0].name])
    for one in simulators:
        cpu_s, wall_s = (statistics.median(turn[key] for turn in turns[one.name]) for key in ("cpu_s", "wall_s"))
        count = iterations[one.name]
        results["speed"][one.name] = {"cpu_s": cpu_s, "wall_s": wall_s, "iterations": count, "turns": turns[one.name]}
        print(
            f"  {one.name:26} {count / cpu_s:11,.0f} iterations/s {case.num_requests / cpu_s:9,.0f} requests/s, "
            f"{base / cpu_s:6.2f} x ours pure ({count:,} iterations, median of {repeats}: {cpu_s:.3f} s of processor "
            f"time, {wall_s:.3f} s in all)",
            flush=True,
        )
    return results


def main() -> None:
    """Measure the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each simulator (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument(
        "--trace", help="instead, a file with timestamps: mooncake:PATH, azure:PATH or another of `fastbench traces`"
    )
    parser.add_argument("--requests", type=int, default=12_000, help="of --trace (default: %(default)s)")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="(default: the last)")
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    arguments = parser.parse_args()
    cases: Sequence[Case] = [case for case in CASES if not arguments.cases or case.name in arguments.cases]
    if arguments.trace:
        cases = [Case(arguments.trace, arguments.trace, ("trace", None), arguments.requests, 512, 8_192)]
    try:
        peers = [peer for name in SIMULATORS if (peer := install(name))]
        os.sched_setaffinity(0, {arguments.core})  # Child processes inherit it.
        with tempfile.TemporaryDirectory() as folder:
            results = {}
            for case in cases:
                chosen = [peer for peer in peers if peer.name in case.peers]
                results[case.name] = measure(case, chosen, Path(folder), arguments.repeats)
    except FastServeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Digests of every policy's sequence of decisions, to compare the code before and after a refactoring.

`make digests` writes tests/decisions/digests.json; the commit that changes the file explains why decisions changed.
"""

from __future__ import annotations

import hashlib
import json
import random
import typing
from collections.abc import Iterator
from pathlib import Path

from fastserve.core.files import atomic_write
from fastserve.engine import Arrival, Observer
from fastserve.policies.discovery import find_policy, list_policies
from fastserve.scheduler import Iteration
from support.engines import arrival, make_engine

FILE = Path(__file__).parents[1] / "decisions" / "digests.json"
MEMORY = {"ample": (2000, 2000), "short": (56, 90)}
"""Blocks of the GPU pool and of the host pool. The longest request takes 30; a short host pool fills up, too."""
_STAGES = (1, 2)
_NUM_REQUESTS = 100
_MEAN_GAP_S = 0.08
"""Faster than any policy serves them, so that all of them preempt, and slow enough for promotions."""


class Case(typing.NamedTuple):
    """One engine whose decisions are recorded."""

    policy: str
    swap: str | None
    """None: the policy has no such option."""
    memory: str
    num_stages: int

    @property
    def name(self) -> str:
        """The case's key in the file."""
        return f"{self.policy} swap={self.swap} memory={self.memory} stages={self.num_stages}"


def cases() -> Iterator[Case]:
    """Every policy of this project with each of its swap modes, ample and short memory, one and two stages."""
    for policy, cls in list_policies().items():
        if cls.__module__.partition(".")[0] not in ("fastserve", "baselines"):
            continue  # Another test's own, or an installed package's.
        for swap in _swap_modes(policy):
            for memory in MEMORY:
                for num_stages in _STAGES:
                    yield Case(policy, swap, memory, num_stages)


def digest(case: Case) -> dict[str, int | str]:
    """Run the case; count its decisions and hash their sequence."""
    num_gpu_blocks, num_host_blocks = MEMORY[case.memory]
    engine = make_engine(
        case.policy,
        {} if case.swap is None else {"swap": case.swap},
        num_gpu_blocks=num_gpu_blocks,
        num_host_blocks=num_host_blocks,
        num_stages=case.num_stages,
    )
    engine.jumps = False  # A jump takes several decisions at once and reports none.
    recorder = _Recorder()
    engine.observer = recorder
    jobs = engine.run(_workload())
    assert all(job.is_done for job in jobs)
    return {
        "decisions": recorder.num_decisions,
        "preemptions": sum(job.preemptions for job in jobs),
        "sha256": recorder.sha256.hexdigest(),
    }


class _Recorder(Observer):
    """Hashes what each decision says: not when it is taken, which is the executor's doing."""

    def __init__(self) -> None:
        self.num_decisions = 0
        self.sha256 = hashlib.sha256()

    def on_submit(self, iteration: Iteration) -> None:
        self.num_decisions += 1
        self.sha256.update(json.dumps(_content(iteration)).encode())


def _content(iteration: Iteration) -> list[typing.Any]:
    return [
        [request.request_id for request in iteration.requests],
        list(iteration.num_scheduled_tokens),
        [[one.request.request_id, list(one.source), list(one.destination)] for one in iteration.swap_out],
        [[one.request.request_id, list(one.source), list(one.destination)] for one in iteration.swap_in],
        [[drop.request.request_id, drop.num_lost_tokens] for drop in iteration.dropped],
        [request.request_id for request in iteration.preempted],
        [request.request_id for request in iteration.stalled],
        iteration.padded,
    ]


def _workload() -> list[Arrival]:
    """Bursts of requests with a few long ones among many short ones; prompts beyond the token budget are among them."""
    rng = random.Random(0)
    at, arrivals = 0.0, []
    for i in range(_NUM_REQUESTS):
        at += rng.expovariate(1 / _MEAN_GAP_S) * (0.1 if i % 10 < 5 else 1.9)
        is_long = rng.random() < 0.2
        prompt = rng.randint(20, 70) if is_long else rng.randint(1, 20)
        arrivals.append(arrival(str(i), at, prompt, rng.randint(1, 50 if is_long else 20)))
    return arrivals


def _swap_modes(policy: str) -> tuple[str | None, ...]:
    hint = typing.get_type_hints(find_policy(policy).Options).get("swap")
    return (None,) if hint is None else typing.get_args(hint)


def main() -> None:
    """Write the file anew."""
    lines = (f"{json.dumps(case.name)}: {json.dumps(digest(case))}" for case in cases())
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    with atomic_write(FILE) as path:
        path.write_text(text, encoding="utf-8")
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()

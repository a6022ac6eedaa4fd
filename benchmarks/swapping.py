"""How much of the time that swapping costs proactive swapping hides, on the CPU engine with one compute thread.

OPT-125m's shape with random weights, policy fastserve, all requests there from the start; one pool that holds nearly
two batches of average caches, and one that holds less than one. Proactive and reactive swapping take turns on the same
requests in one process. Exposed is the time in which nothing is computed because of transfers; hidden is the share of
reactive's that proactive saves.

Exposed time is not all that swapping costs: copies beside the computation slow it down where they share memory and
cores with it, as on a CPU, and a batch that goes on without those that are away is smaller. So an engine whose pool is
never short takes its turn as well. Runs are compared by the CPU time of the thread that computes, to which the exposed
time is to be added: on a machine shared with others, durations differ by more than little swapping costs.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import NamedTuple

import torch

from fastserve import LLM, SamplingParams
from fastserve.engine import FinishedTransfer, Observer
from fastserve.kvcache import Direction

BLOCK_SIZE, AMPLE, TARGET = 16, 400, 0.9

Case = tuple[str, int]
"""How caches move, and the blocks on the device."""


class CopyTime(Observer):
    """An engine's observer that adds up what its copies took."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.num_bytes = dict.fromkeys(Direction, 0)

    def on_transfer(self, finished: FinishedTransfer) -> None:
        """Add one."""
        self.seconds += finished.end_s - finished.start_s
        self.num_bytes[finished.transfer.direction] += finished.transfer.num_bytes


class Outcome(NamedTuple):
    """What was measured of one run; times in seconds, sizes in bytes."""

    duration: float
    cpu: float
    """Of the thread that schedules and computes."""
    iterations: float
    batch: float
    """Requests of an iteration, on average."""
    exposed: float
    waiting: float
    """Request-seconds of those that were due and waited for a transfer, while others ran or not."""
    copying: float
    bytes_out: float
    bytes_in: float
    preemptions: float
    recomputed: float


def measure(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> tuple[Outcome, list[list[int]]]:
    """One run, and its tokens."""
    engine, copies = llm.engine, CopyTime()
    engine.observer = copies
    first, began, cpu_began = len(engine.iterations), engine.clock.now(), time.thread_time()
    outputs = llm.generate(prompt_token_ids=prompts, sampling_params=params)
    cpu, records = time.thread_time() - cpu_began, engine.iterations[first:]
    return Outcome(
        duration=engine.clock.now() - began,
        cpu=cpu,
        iterations=len(records),
        batch=statistics.mean(record.num_requests for record in records),
        exposed=sum(record.stalled_s for record in records),
        waiting=sum(output.metrics.swapping_s for output in outputs),
        copying=copies.seconds,
        bytes_out=copies.num_bytes[Direction.OUT],
        bytes_in=copies.num_bytes[Direction.IN],
        preemptions=sum(output.metrics.preemptions for output in outputs),
        recomputed=sum(output.metrics.recomputed_tokens for output in outputs),
    ), [output.token_ids for output in outputs]


def row(case: Case, runs: list[Outcome]) -> str:
    """A line of the table: medians of a case."""
    swap, blocks = case
    median = Outcome(*(statistics.median(values) for values in zip(*runs, strict=True)))
    share = f"{median.exposed / median.copying:.0%}" if median.copying else "-"
    return (
        f"{swap:10}{blocks:7}{median.duration:8.2f} s{median.cpu:7.2f} s{median.iterations:7,.0f}{median.batch:7.2f}"
        f"{median.exposed:8.3f} s{median.waiting:8.2f} s{median.copying:7.3f} s{share:>8}"
        f"{median.bytes_out / 2**20:8,.0f}{median.bytes_in / 2**20:8,.0f}{median.preemptions:8,.0f}"
        f"{median.recomputed:8,.0f}"
    )


def verdict(blocks: int, outcomes: dict[Case, list[Outcome]]) -> str:
    """What of reactive's exposed time is hidden in this pool, and what both cost in all."""
    ample, reactive, proactive = (
        outcomes[case] for case in (("ample", AMPLE), ("reactive", blocks), ("proactive", blocks))
    )
    shares = [1 - b.exposed / a.exposed for a, b in zip(reactive, proactive, strict=True) if a.exposed]
    if not shares:
        return f"{blocks} blocks: reactive exposes nothing, so there is nothing to hide"
    hidden = statistics.median(shares)
    costs = (
        [(run.cpu + run.exposed) / free.cpu - 1 for free, run in zip(ample, runs, strict=True)]
        for runs in (reactive, proactive)
    )
    texts = (f"{statistics.median(cost):+.0%} ({', '.join(f'{one:+.0%}' for one in cost)})" for cost in costs)
    return (
        f"{blocks} blocks: {hidden:.1%} of the exposed time hidden ({', '.join(f'{share:.1%}' for share in shares)}), "
        f"target {TARGET:.0%} {'met' if hidden >= TARGET else 'missed'}; CPU and exposed time over that of an ample "
        f"pool: reactive {next(texts)}, proactive {next(texts)}"
    )


def main() -> None:
    """Print the medians of all cases, and the share that is hidden, with its single values."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--blocks", type=int, nargs="+", default=[60, 26], help="on the device, where they are short")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(0)
    prompts = [[rng.randrange(4, 50_000) for _ in range(rng.randint(32, 160))] for _ in range(arguments.requests)]
    params = [SamplingParams(max_tokens=rng.randint(16, 64), ignore_eos=True) for _ in prompts]
    cases: list[Case] = [("ample", AMPLE)]
    cases += [(swap, blocks) for blocks in arguments.blocks for swap in ("reactive", "proactive")]
    engines = {
        (swap, blocks): LLM(
            "opt-125m",
            load_format="dummy",
            policy_options={"swap": "proactive" if swap == "ample" else swap},
            # One profile for all, so that they take turns for the same reasons.
            profile="a100-80g/opt-13b-tp1-swifttransformer",
            num_gpu_blocks=blocks,
            num_host_blocks=AMPLE,
            block_size=BLOCK_SIZE,
            max_batch_size=arguments.batch,
        )
        for swap, blocks in cases
    }
    sizes = [-(-(len(ids) + one.max_tokens) // BLOCK_SIZE) for ids, one in zip(prompts, params, strict=True)]
    block_bytes = engines["ample", AMPLE].engine.kv.config.block_bytes
    print(
        f"opt-125m float32: {len(prompts)} requests that need {sum(sizes)} blocks of {block_bytes / 2**20:.2f} MiB in "
        f"all, a batch of {arguments.batch} {arguments.batch * statistics.mean(sizes):.0f} on average\n"
    )
    outcomes: dict[Case, list[Outcome]] = {case: [] for case in cases}
    tokens: dict[Case, list[list[int]]] = {}
    for llm in engines.values():
        measure(llm, prompts[:2], params[:2])
    for _ in range(arguments.repeats):
        for case, llm in engines.items():
            outcome, tokens[case] = measure(llm, prompts, params)
            outcomes[case].append(outcome)
    print(
        f"{'medians':10}{'blocks':>7}{'run':>10}{'CPU':>9}{'iter.':>7}{'batch':>7}{'exposed':>10}{'waiting':>10}"
        f"{'copies':>9}{'exp/cop':>8}{'MiB out':>8}{'MiB in':>8}{'preempt':>8}{'recomp.':>8}"
    )
    for case, runs in outcomes.items():
        print(row(case, runs))
    for blocks in arguments.blocks:
        print(verdict(blocks, outcomes))
    print(f"tokens {'equal' if all(ids == tokens[cases[0]] for ids in tokens.values()) else 'DIFFER'} in all cases")
    for llm in engines.values():
        llm.close()


if __name__ == "__main__":
    main()

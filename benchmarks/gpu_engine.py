"""What the engine adds to a decode iteration: the time from one start to the next less the device's own for the step.

A real engine under each policy, all requests there from the start and as many as a batch holds, so that all
iterations after the prompts decode the full batch. The device's time is that of the same step (same batch, same mean
context) by events on the device, as gpu_decode.py measures it, between two contexts interpolated. The host's part is
printed as it is spent: deciding (schedule), starting the step (submit), waiting for it, which is when the device works
and the next step is prepared (collect), advancing the requests (update), and the rest of the loop.

The last rows are of a worker whose steps end as they begin: what of the host's work no device could hide. They need no
GPU to mean something.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from _gpu import device_seconds, engine_on, parser, run_benchmark, table, verdict

from fastserve import SamplingParams
from fastserve.core.presets import preset
from fastserve.engine import Engine, EngineView, Observer
from fastserve.runtime.models import SequenceInput
from fastserve.runtime.worker import Worker
from fastserve.runtime.worker.runner import Computed
from fastserve.scheduler import Iteration

POLICIES = ("fastserve-fcfs", "vllm", "fastserve")
BLOCK_SIZE, PROMPT, TARGET = 16, 256, 0.03
BATCHES, OUTPUTS = {"cuda": (16, 64), "cpu": (4,)}, {"cuda": 128, "cpu": 24}
PARTS = ("schedule", "submit", "collect", "update")

Row = tuple[float, float, dict[str, float]]
"""Seconds from the start before, the mean context before, and the seconds of each part."""


class Decodes(Observer):
    """An engine's observer that notes the start and the mean context of its decode iterations, and times its parts."""

    def __init__(self, engine: Engine) -> None:
        self.iterations: list[tuple[float, int, float, dict[str, float]]] = []
        """Start, batch, mean context, seconds of each part since the last one; batch 0 where there are prompts."""
        self._seconds = dict.fromkeys(PARTS, 0.0)
        for owner, name in (
            (engine.scheduler, "schedule"),
            (engine.executor, "submit"),
            (engine.executor, "collect"),
            (engine.scheduler, "update"),
        ):
            setattr(owner, name, self._timed(name, getattr(owner, name)))

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self._seconds[name] += time.perf_counter() - began

        return timed

    def on_iteration(self, engine: EngineView, iteration: Iteration, start_s: float, end_s: float) -> None:
        """Add one. What `update` takes for it counts to the next, like the decision that follows it."""
        decoding = all(request.is_decoding for request in iteration.requests)
        contexts = [request.num_computed_tokens + 1 for request in iteration.requests]
        parts, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        self.iterations.append((start_s, len(contexts) if decoding else 0, statistics.mean(contexts), parts))


def steady(decodes: Decodes, batch: int) -> list[Row]:
    """Of iterations after one of the same full batch."""
    return [
        (this[0] - before[0], before[2], this[3])
        for before, this in itertools.pairwise(decodes.iterations)
        if before[1] == this[1] == batch
    ]


def serve(arguments: argparse.Namespace, worker: Worker, policy: str, batch: int) -> list[Row]:
    """Run a batch of requests to their ends."""
    rng = random.Random(0)
    vocab_size = worker.model.config.vocab_size
    prompts = [[rng.randrange(vocab_size) for _ in range(PROMPT)] for _ in range(batch)]
    with engine_on(worker, arguments, policy, batch) as llm:
        decodes = llm.engine.observer = Decodes(llm.engine)
        params = SamplingParams(max_tokens=OUTPUTS[worker.device.type], ignore_eos=True)
        llm.generate(prompt_token_ids=prompts, sampling_params=params)
    return steady(decodes, batch)


@contextmanager
def steps_at_once(worker: Worker) -> Iterator[None]:
    """Within, the worker's steps end as they begin, with the same token for all."""
    launch = lambda sequences, sampling, extras=None: lambda: Computed([7] * len(sequences))  # noqa: E731
    worker.launch = launch  # type: ignore[method-assign]
    try:
        yield
    finally:
        del worker.launch


def step_seconds(worker: Worker, batch: int, context: int, repeats: int) -> float:
    """The device's own time for a decode step."""
    blocks = -(-context // BLOCK_SIZE)
    sequences = [SequenceInput([7 + i], context - 1, list(range(i * blocks, (i + 1) * blocks))) for i in range(batch)]
    params = [SamplingParams()] * batch
    return device_seconds(lambda: worker.launch(sequences, params), worker.device, repeats, ahead_s=3e-3)


def summarize(
    policy: str, batch: int, rows: Sequence[Row], device_s: Callable[[float], float] | None
) -> dict[str, Any]:
    """Medians of one run; with the device's time by mean context, the share that is outside of it."""
    iteration_s = statistics.median(row[0] for row in rows)
    parts = {name: statistics.median(row[2][name] for row in rows) for name in PARTS}
    result: dict[str, Any] = {
        "policy": policy,
        "batch": batch,
        "iterations": len(rows),
        "iteration_s": iteration_s,
        **{f"{name}_s": seconds for name, seconds in parts.items()},
        "rest_s": statistics.median(row[0] - sum(row[2].values()) for row in rows),
    }
    if device_s is not None:
        result["device_s"] = statistics.median(device_s(row[1]) for row in rows)
        result["share_outside"] = statistics.median(1 - device_s(row[1]) / row[0] for row in rows)
    return result


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, and print the table."""
    config, kind = preset(arguments.model), torch.device(arguments.device).type
    longest = PROMPT + OUTPUTS[kind]
    worker = Worker(
        config,
        num_gpu_blocks=max(BATCHES[kind]) * -(-longest // BLOCK_SIZE),
        num_host_blocks=16,
        block_size=BLOCK_SIZE,
        device=arguments.device,
        dtype=arguments.dtype,
        max_batch_size=max(BATCHES[kind]),
    )
    runs, of_host = [], []
    for batch in BATCHES[kind]:
        contexts = (PROMPT, longest)
        seconds = [step_seconds(worker, batch, context, arguments.repeats) for context in contexts]

        def device_s(context: float, contexts: Any = contexts, seconds: Any = seconds) -> float:
            return float(np.interp(context, contexts, seconds))

        for policy in POLICIES:
            serve(arguments, worker, policy, batch)  # Warms up.
            runs.append(summarize(policy, batch, serve(arguments, worker, policy, batch), device_s))
            with steps_at_once(worker):
                of_host.append(summarize(policy, batch, serve(arguments, worker, policy, batch), None))
    print(f"decode iterations of {arguments.model} in {arguments.dtype}: medians, us")
    table(
        ("policy", "batch", "iteration", "device", "outside", *PARTS, "rest"),
        [
            (
                one["policy"] if "device_s" in one else f"{one['policy']}, host alone",
                one["batch"],
                *(f"{one[name] * 1e6:.0f}" if name in one else "-" for name in ("iteration_s", "device_s")),
                f"{one['share_outside']:.1%}" if "share_outside" in one else "-",
                *(f"{one[f'{name}_s'] * 1e6:.0f}" for name in (*PARTS, "rest")),
            )
            for one in (*runs, *of_host)
        ],
    )
    targets = [
        verdict(
            f"{one['policy']}, batch {one['batch']}, outside of the device", one["share_outside"], TARGET, at_most=True
        )
        for one in runs
    ]
    return {"runs": runs, "host_alone": of_host, "targets": targets}


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=20, help="of a step on the device (default: %(default)s)")
    run_benchmark(options, benchmark)

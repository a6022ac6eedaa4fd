"""The profiler that measures meanwhile: it times a grid of iterations in its turns and fits a profile to them."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

from fastserve.core.config import dtype_bytes
from fastserve.latency import Profile, StageLink, fit_link
from fastserve.latency.fitting import Shape, StageTimes, by_stage, fit, residuals, with_overhead
from harness.run.config import RunConfig
from harness.studies.fidelity.bench import Bench, cache_sizes
from harness.studies.fidelity.turns import Turn
from harness.studies.processors import Watch

DECODES_IN_A_ROW = 4
"""Decodes that are timed before an iteration with a prompt: a decode between prompts is not what engines run."""
SENDS_EVERY = 4
"""Turns between two timings of sends, which take as long as a turn."""


class Profiler:
    """Times a grid of iterations on a bench."""

    def __init__(self, config: RunConfig, shapes: Sequence[Shape], bench: Bench, watch: Watch) -> None:
        self._config = config
        self._bench = bench
        self._watch = watch
        self._samples: dict[Shape, list[StageTimes]] = {shape: [] for shape in shapes}
        self._sends: dict[int, list[float]] = {}
        self._wall_s = self._processor_s = 0.0
        self._shapes = self._in_order()

    def warm_up(self, num_tokens: int) -> None:
        """Run prompts of 1 to `num_tokens` tokens."""
        warm_up(self._bench.stage_times, num_tokens)

    def measure_all(self, repeats: int) -> None:
        """Time the whole grid `repeats` times, after one pass to warm up."""
        for shape in self._samples:
            self._bench.stage_times(*shape)
        for _ in range(repeats):
            for shape in self._samples:
                self._sample(shape)
        self._sample_sends(repeats=10)

    def measure_in_turns(self, turn: Turn) -> None:
        """Time the grid over and over, as long as there are turns.

        Raises BusyMachineError if other programs take processors meanwhile.
        """
        from fastserve.runtime.worker.devices import set_threads

        set_threads(self._config.torch_threads)  # Torch keeps a number for each thread, and this is another.
        turn.paused = self._bench.frozen
        for count in itertools.count(1):
            decode, other = next(self._shapes)
            left_s = turn.length_s - sum(self._sample(shape) for shape in (*[decode] * DECODES_IN_A_ROW, other))
            while left_s > 0:
                left_s -= self._sample(decode)
            if not count % SENDS_EVERY:  # At the end of a turn, when ranks that were stopped have found a core again.
                self._sample_sends(repeats=2)
            self._watch.look()
            turn.yield_turn()

    def forget(self) -> None:
        """Drop all samples but the last of each shape, so that no shape lacks one."""
        for samples in self._samples.values():
            del samples[:-1]
        self._wall_s = self._processor_s = 0.0

    def profile(self, overhead_s: float) -> Profile:
        """Fit a profile to the samples so far, with `overhead_s` added to every iteration.

        The fit takes the mean of each shape: a run's time, too, is a sum that includes slow spells.
        """
        from fastserve.runtime.worker.devices import num_threads

        config, bench = self._config, self._bench
        channel_s = statistics.mean(each.channel_s for samples in self._samples.values() for each in samples)
        bytes_per_token = bench.model.hidden_size * dtype_bytes(config.dtype)
        sends = [(size, statistics.mean(seconds)) for size, seconds in self._sends.items()]
        link = StageLink(*fit_link(sends), bytes_per_token, rendezvous=True) if sends else None
        of_stages = by_stage(list(self._samples), list(self._samples.values()), link, statistics.mean)
        stages = [fit(measurements, by_batch_size=True) for measurements in of_stages]
        all_residuals = [residuals(*each) for each in zip(stages, of_stages, strict=True)]
        num_gpu_blocks, _, block_size = cache_sizes(config)
        kind, _, _ = config.device.partition(":")
        threads = config.torch_threads or num_threads()
        world_size = config.parallel.world_size
        of_ranks = f", {world_size} ranks" if world_size > 1 else ""
        return Profile(
            name="fidelity",
            model=bench.model.name,
            hardware=f"{kind}{of_ranks}, {threads} threads",
            engine="fastserve",
            dtype=config.dtype,
            tensor_parallel_size=config.tensor_parallel_size,
            pipeline_parallel_size=config.pipeline_parallel_size,
            stage=with_overhead(stages[0], overhead_s + channel_s),
            later_stages=tuple(stages[1:]),
            stage_link=link,
            kv_capacity_tokens=num_gpu_blocks * block_size,
            kv_bytes_per_token=bench.model.kv_bytes_per_token(config.dtype),
            host_link=bench.host_link,
            provenance={
                "source": "the fidelity experiment",
                "measured": datetime.now(UTC).isoformat(timespec="seconds"),
                "samples": sum(map(len, self._samples.values())),
                "overhead_s": overhead_s,
                "channel_s": channel_s,
                "stage_link": [{"bytes": size, "seconds": seconds} for size, seconds in sends],
                "processor_share": self.processor_share,
                "residuals": all_residuals[0],
                "later_residuals": all_residuals[1:],
            },
        )

    @property
    def processor_share(self) -> float:
        """Share of the processors that was left to the measurement, at its lowest.

        A single rank computes all the time, so its processor time over its wall time must be 1 too. Of several ranks,
        those that all-reduce wait for the others.
        """
        is_alone = self._config.parallel.world_size == 1 and self._wall_s > 0
        return min(self._watch.lowest, self._processor_s / self._wall_s if is_alone else 1.0)

    def _sample(self, shape: Shape) -> float:
        processor_s = time.thread_time()
        times = self._bench.stage_times(*shape)
        self._samples[shape].append(times)
        seconds = max(times.stages)
        self._wall_s += seconds
        self._processor_s += time.thread_time() - processor_s
        return seconds

    def _sample_sends(self, repeats: int) -> None:
        for size, seconds in self._bench.send_times(repeats):
            self._sends.setdefault(size, []).append(seconds)

    def _in_order(self) -> Iterator[tuple[Shape, Shape]]:
        """The shapes of each turn: a decode, timed in a row as an engine runs it, and an iteration with a prompt."""
        decodes = [shape for shape in self._samples if not shape[0]]
        others = [shape for shape in self._samples if shape[0]]
        return zip(itertools.cycle(decodes), itertools.cycle(others), strict=True)


def warm_up(stage_times: Callable[[Sequence[int], Sequence[int]], StageTimes], num_tokens: int) -> None:
    """Run prompts of 1 to `num_tokens` tokens: the first time, oneDNN makes a kernel for each number."""
    for count in range(1, num_tokens + 1):
        stage_times([count], [])

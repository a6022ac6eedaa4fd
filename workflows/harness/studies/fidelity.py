"""Fidelity: the simulator against the real engine of this machine, on the same workloads.

The speed of a shared machine wanders by a tenth and more within a second, and the wait in a queue follows it with a
multiple. A profile measured before a run would then say more about the machine's neighbours than about the simulator.
So all real runs and the profiler take turns of a few iterations, and an engine's clock stands still while it is not
its turn: all of them see the same machine. They also share one model, since copies of the same weights differ in speed
by where in memory they happen to lie. The profile stays independent of the runs: it is of iterations of other
shapes, timed on a worker of the profiler's own.

An engine of several ranks takes turns as well: each run, and the profiler, has ranks of its own, which are stopped
(SIGSTOP) in the middle of whatever they compute when the turn ends, together with the engine's clock.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Semaphore
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd

from fastserve.core.checks import require_positive
from fastserve.core.clock import WallClock
from fastserve.core.config import ModelConfig
from fastserve.core.errors import ConfigError
from fastserve.core.files import atomic_write
from fastserve.core.parallel import ParallelConfig
from fastserve.engine import EngineView, Observer
from fastserve.latency import HostLink, Profile, StageLink, fit_link
from fastserve.latency.fitting import Shape, StageTimes, by_stage, fit, residuals, times_between, with_overhead
from fastserve.policies.settings import resolve_settings
from fastserve.scheduler import Iteration
from harness.analysis.points import write_csv
from harness.run.config import RunConfig
from harness.run.runner import run
from harness.workload.workload import make_workload

if TYPE_CHECKING:
    from fastserve.runtime.executors.ranks import RankGroup

METRICS = ("mean_jct_s", "p95_jct_s", "mean_normalized_latency_s", "p95_normalized_latency_s", "mean_ttft_s")
"""What is compared: keys of summary.json."""
COUNTS = ("preemptions", "iterations")
"""What is shown beside it."""
ALONE = 0.97
"""A `processor_share` below this says that other processes took part of the processor: the errors are theirs, too."""
JUDGED = ("mean_jct_s", "p95_jct_s")
"""What must agree."""
TURN_S = 0.03
"""Computing time of a turn: short against the machine's wandering, long against the cold caches it begins with."""
TURN_OF_RANKS_S = 0.1
"""Of several ranks, whose iterations are longer, and who need a moment to go on."""
SENDS_EVERY = 4
"""Turns of the profiler until it times sends again, which takes as long as a turn."""
RUNS_PER_PROFILER = 3
"""Runs after whose turns the profiler has one."""
DECODES_IN_A_ROW = 4
"""Decodes that the profiler times before an iteration with a prompt: a decode among prompts is not what engines run."""
_CALIBRATION_REQUESTS = 24
_RANK_TIMEOUT_S = 30.0
_SENT_TOKENS = (4, 64)
AT_ONCE = 1e6
"""A rate (requests/s) at which all requests arrive together."""


def measure_fidelity(config: Mapping[str, Any], out: Path) -> pd.DataFrame:
    """Carry out the experiment; write `out`/points.csv and what it comes from, and return the table.

    `config` is an experiment: `run` (a partial RunConfig of the engine, with all sizes of the cache), `series` (name,
    label, policy, run), `points` (load, num_requests), `seeds` (one), and `architecture`, where the model is no
    preset: the content of a config.json in Hugging Face format. A series' `run` may say how many ranks serve it; the
    steps are then done for each number of shards and stages by itself.

    1. Warm up: every number of tokens that an iteration can have runs once. A first profile (`out`/profile.json).
    2. Each policy serves some requests that arrive at once: its engine's own time between two iterations.
    3. A load is the share of the service rate: that at which the simulator, under the first policy and the first
       profile, completes the point's requests when all are there from the start.
    4. The real runs and the profiler take turns. `out`/runs/NAME/load-L/profile.json is what the profiler measured
       until that run ended, with the policy's own time added to every iteration; `real` and `sim` are the runs.

    Column `processor_share` of the table is the part of the profiler's time in which it had a processor: 1 on a machine
    that does nothing else, and then alone the comparison is fair.

    Raises ConfigError for bad input.
    """
    # Its default, 1024 kernels, is fewer than one for each matrix and number of tokens. Read when torch first computes.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    experiment = _Experiment.of(config, out)
    from fastserve.runtime.models import shared_models

    pairs: list[_Pair] = []
    with shared_models():
        for of_shape in experiment.by_shape():
            pairs += _measure(of_shape, out)
    for pair in pairs:
        run(simulated(pair.config, pair.folder / "profile.json"), pair.folder / "sim")
    table = pd.DataFrame([pair.row() for pair in pairs])
    write_csv(table, out / "points.csv")
    return table


def _measure(experiment: _Experiment, out: Path) -> list[_Pair]:
    """Steps 1 to 4 for series of one shape of ranks: everything that takes real time."""
    from fastserve.runtime.worker.probe import StageProbe

    config = experiment.config
    folder = out / experiment.name
    folder.mkdir(parents=True, exist_ok=True)
    with closing(_bench(config)) as bench:
        profiler = Profiler(config, experiment.shapes, bench)
        profiler.warm_up(experiment.longest_prompt + experiment.max_batch_size)
        profiler.measure_all(repeats=3)
        profiler.profile(0.0).save(folder / "profile.json")
        first = replace(config, profile=str(folder / "profile.json"))

        overhead_s = {
            series["name"]: bench.overhead(
                _of_series(first, series), profiler.profile(0.0), folder / "calibration" / series["name"]
            )
            for series in experiment.series
        }
        pairs = []
        for point in experiment.points:
            rate = service_rate(
                simulated(_of_series(first, experiment.series[0]), folder / "profile.json"),
                point["num_requests"],
                folder / "calibration" / "service-rate",
            )
            for series in experiment.series:
                at_load = replace(
                    _of_series(first, series),
                    rate=float(f"{point['load'] * rate:.3g}"),
                    num_requests=point["num_requests"],
                )
                pairs.append(
                    _Pair(series, point["load"], at_load, out / "runs" / series["name"] / f"load-{point['load']:g}")
                )

        def measure_real(pair: _Pair, turn: Turn) -> None:
            with bench.start_clone() as ranks:
                if ranks is not None:
                    turn.paused = ranks.frozen
                    _warm_up(StageProbe(ranks).stage_times, experiment.longest_prompt + experiment.max_batch_size)
                run(pair.config, pair.folder / "real", observer=turn, ranks=ranks)
            profiler.profile(overhead_s[pair.series["name"]]).save(pair.folder / "profile.json")

        profiler.forget()
        length_s = TURN_S if experiment.parallel.world_size == 1 else TURN_OF_RANKS_S
        take_turns([partial(measure_real, pair) for pair in pairs], profiler.measure_in_turns, length_s)
    return pairs


def verdict(table: pd.DataFrame, bound: float = 0.1) -> pd.Series:
    """For each row whether simulation and reality agree: mean and P95 of the completion time within `bound`."""
    return (table[[f"error_{metric}" for metric in JUDGED]].abs() <= bound).all(axis=1)


def simulated(config: RunConfig, profile: Path) -> RunConfig:
    """The same run of the simulator, on the iteration times of `profile`."""
    return RunConfig(
        backend="sim",
        policy=config.policy,
        trace=config.trace,
        arrivals=config.arrivals,
        rate=config.rate,
        num_requests=config.num_requests,
        seed=config.seed,
        history=config.history,
        history_requests=config.history_requests,
        profile=str(profile),
        tokenizer=config.tokenizer,
        settings=config.settings,
    )


def service_rate(simulation: RunConfig, num_requests: int, folder: Path) -> float:
    """Requests/s at which the simulator completes so many requests that are all there at 0 s; `folder` has the run."""
    summary = run(replace(simulation, rate=AT_ONCE, num_requests=num_requests), folder)
    return num_requests / float(summary["duration_s"])


def compared(real: Path, sim: Path, metrics: Sequence[str], counts: Sequence[str]) -> dict[str, Any]:
    """Of two runs' folders, the columns real_, sim_ and error_ = (sim - real) / real of each metric, and the first two
    of each count. An error is None where a run has no value, since no request finished."""
    measured, expected = (json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in (real, sim))
    row: dict[str, Any] = {}
    for metric in metrics:
        row |= {f"real_{metric}": measured[metric], f"sim_{metric}": expected[metric]}
        known = measured[metric] and expected[metric] is not None
        row[f"error_{metric}"] = expected[metric] / measured[metric] - 1 if known else None
    for count in counts:
        row |= {f"real_{count}": measured[count], f"sim_{count}": expected[count]}
    return row


def time_between_iterations(folder: Path) -> float:
    """Median seconds from the end of an iteration to the start of the next, in a run that never idles, of a single
    rank."""
    iterations = pd.read_parquet(folder / "iterations.parquet", columns=["start_s", "end_s"])
    return float(np.median(times_between(iterations["start_s"].tolist(), iterations["end_s"].tolist())))


# -- what is run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Experiment:
    config: RunConfig
    series: Sequence[Mapping[str, Any]]
    points: Sequence[Mapping[str, Any]]
    max_batch_size: int
    longest_prompt: int
    longest_context: int

    @property
    def parallel(self) -> ParallelConfig:
        """The shape of the ranks."""
        return _shape_of(self.config)

    @property
    def name(self) -> str:
        """Of the folder below the experiment's for what all runs have in common; none for a single rank."""
        parallel = self.parallel
        if parallel.world_size == 1:
            return ""
        return f"{parallel.tensor_parallel_size}-shards-{parallel.pipeline_parallel_size}-stages"

    def by_shape(self) -> Iterator[_Experiment]:
        """An experiment for each shape of ranks that series have."""
        configs = [_of_series(self.config, series) for series in self.series]
        for shape in dict.fromkeys(map(_shape_of, configs)):
            yield replace(
                self,
                config=replace(
                    self.config,
                    tensor_parallel_size=shape.tensor_parallel_size,
                    pipeline_parallel_size=shape.pipeline_parallel_size,
                ),
                series=[
                    series for series, config in zip(self.series, configs, strict=True) if _shape_of(config) == shape
                ],
            )

    @classmethod
    def of(cls, config: Mapping[str, Any], out: Path) -> _Experiment:
        fields = dict(config["run"])
        if "architecture" in config:
            fields["model"] = str(_write_model(config["architecture"], out / "model"))
        if len(config["seeds"]) != 1:
            raise ConfigError(f"the fidelity experiment takes one seed, got {list(config['seeds'])}")
        run_config = RunConfig(backend="engine", seed=config["seeds"][0], **fields)
        if run_config.model is None:
            raise ConfigError("the fidelity experiment needs run.model or an architecture")
        for point in config["points"]:
            require_positive("load", point["load"])
        for series in config["series"]:
            options, _ = resolve_settings(series["policy"], _of_series(run_config, series).settings)
            if options.num_gpu_blocks is None or options.num_host_blocks is None:
                raise ConfigError(
                    "set num_gpu_blocks and num_host_blocks: the engine and the simulation must have the same cache"
                )
        num_requests = max(point["num_requests"] for point in config["points"])
        workload = make_workload(
            run_config.trace, run_config.arrivals, 1.0, num_requests, run_config.seed, run_config.tokenizer
        )
        return cls(
            config=run_config,
            series=config["series"],
            points=config["points"],
            max_batch_size=options.max_batch_size,
            longest_prompt=int(workload.prompt_tokens.max()),
            longest_context=int((workload.prompt_tokens + workload.output_tokens).max()),
        )

    @property
    def shapes(self) -> list[Shape]:
        """What the profiler measures: prompts up to the longest, decodes of every batch size, and some mixtures."""
        prompts = sorted({max(1, round(self.longest_prompt * share)) for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)})
        contexts = sorted({max(2, round(self.longest_context * share)) for share in (1 / 8, 3 / 8, 3 / 4)})
        most = self.max_batch_size
        shapes: list[Shape] = [((length,), ()) for length in prompts]
        shapes += [((length,) * count, ()) for length in prompts[:2] for count in (2, most) if count > 1]
        shapes += [((), (context,) * size) for size in range(1, most + 1) for context in contexts]
        shapes += [((length,), (contexts[0],) * size) for length in prompts[1:4] for size in {1, most - 1} if size]
        return shapes


@dataclass(frozen=True)
class _Pair:
    """One row: a real run and the simulation of it."""

    series: Mapping[str, Any]
    load: float
    config: RunConfig
    folder: Path

    def row(self) -> dict[str, Any]:
        """Both runs and their differences, from their files."""
        row = {
            "series": self.series["name"],
            "label": self.series["label"],
            "policy": self.config.policy,
            "load": self.load,
            "rate": self.config.rate,
            "num_requests": self.config.num_requests,
            "seed": self.config.seed,
        }
        row |= compared(self.folder / "real", self.folder / "sim", METRICS, COUNTS)
        profile = json.loads((self.folder / "profile.json").read_text(encoding="utf-8"))
        row["processor_share"] = profile["provenance"]["processor_share"]
        return row | {"real_run": (self.folder / "real").as_posix(), "sim_run": (self.folder / "sim").as_posix()}


def _shape_of(config: RunConfig) -> ParallelConfig:
    return ParallelConfig(config.tensor_parallel_size, config.pipeline_parallel_size, config.stage_layers)


def _of_series(config: RunConfig, series: Mapping[str, Any]) -> RunConfig:
    own = dict(series.get("run", {}))
    settings = {**config.settings, **own.pop("settings", {})}
    return replace(config, policy=series["policy"], settings=settings, **own)


def _write_model(architecture: Mapping[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "config.json") as staging:
        staging.write_text(json.dumps(dict(architecture), indent=2) + "\n", encoding="utf-8")
    return folder


# -- turns -----------------------------------------------------------------------------------------------------------


class _Cancelled(Exception):
    """The job is not needed any more."""


class Turn(Observer):
    """One job's part of the rounds. As an engine's observer it stops the engine's clock until the next turn."""

    def __init__(self, job: Callable[[Turn], object], length_s: float) -> None:
        self.length_s = length_s
        self.has_ended = False
        self._job = job
        self._left_s = length_s
        self._is_cancelled = False
        self.paused: Callable[[], AbstractContextManager[None]] = nullcontext
        """Within it what the job has started outside this process stands still."""
        self._begin, self._end = Semaphore(0), Semaphore(0)

    def play(self) -> None:
        """Do the job, in turns; called in a thread of its own."""
        try:
            self._begin.acquire()
            if not self._is_cancelled:
                self._job(self)
        except _Cancelled:
            pass
        finally:
            self.has_ended = True
            self._end.release()

    def give(self) -> None:
        """Let it have a turn, and wait until that is over."""
        self._begin.release()
        self._end.acquire()

    def cancel(self) -> None:
        """Let it end without another turn."""
        self._is_cancelled = True
        self._begin.release()

    def yield_turn(self) -> None:
        """Wait for the next turn; called by the job."""
        with self.paused():
            self._end.release()
            self._begin.acquire()
        if self._is_cancelled:
            raise _Cancelled

    def on_iteration(self, engine: EngineView, iteration: Iteration, start_s: float, end_s: float) -> None:
        """Count the computing time; when the turn's is used up, wait for the next turn."""
        self._left_s -= end_s - start_s
        if self._left_s <= 0:
            self._left_s = self.length_s
            assert isinstance(engine.clock, WallClock)
            with engine.clock.stopped():
                self.yield_turn()


def take_turns(jobs: Sequence[Callable[[Turn], object]], companion: Callable[[Turn], object], length_s: float) -> None:
    """Do all jobs, one at a time, in rounds in which each has a turn of `length_s` seconds of computing.

    The companion has a turn after every `RUNS_PER_PROFILER` of them, and is cancelled when all have ended. Each turn is
    taken in a thread of its own, the companion's too: where cores are short, the system favours a thread that has
    rested, and none may have rested longer. The first job that fails ends all, with its error.
    """
    main = [Turn(job, length_s) for job in jobs]
    circle = list(main)
    for i in range(len(jobs), 0, -RUNS_PER_PROFILER):
        circle.insert(i, Turn(companion, length_s))
    with ThreadPoolExecutor(len(circle)) as pool:
        futures = {turn: pool.submit(turn.play) for turn in circle}
        try:
            while not all(turn.has_ended for turn in main):
                for turn in circle:
                    if not turn.has_ended:
                        turn.give()
                        if turn.has_ended:
                            futures[turn].result()
        finally:
            for turn in circle:
                turn.cancel()


# -- what computes -----------------------------------------------------------------------------------------------------


class Bench(Protocol):
    """What the profiler times, of the model and with the cache of a run."""

    model: ModelConfig
    host_link: HostLink

    def stage_times(self, prefill_lens: Sequence[int], context_lens: Sequence[int]) -> StageTimes:
        """Of an iteration of this shape."""

    def send_times(self, repeats: int) -> list[tuple[int, float]]:
        """Bytes and seconds of messages from stage to stage; none with a single stage."""

    def overhead(self, config: RunConfig, profile: Profile, folder: Path) -> float:
        """Seconds of that policy's engine from the end of an iteration to the start of the next; `folder` is for a
        run."""

    def start_clone(self) -> AbstractContextManager[RankGroup | None]:
        """Other ranks like those that are timed, for a run; None where a run makes a worker of its own."""

    def frozen(self) -> AbstractContextManager[None]:
        """Within, ranks stand still."""

    def close(self) -> None:
        """End the ranks."""


def _bench(config: RunConfig) -> Bench:
    return _WorkerBench(config) if _shape_of(config).world_size == 1 else _RanksBench(config)


def _cache_sizes(config: RunConfig) -> tuple[int, int, int]:
    """Blocks on the device and the host, and tokens of a block."""
    options, _ = resolve_settings(config.policy, config.settings)
    assert options.num_gpu_blocks is not None
    assert options.num_host_blocks is not None
    return options.num_gpu_blocks, options.num_host_blocks, options.block_size


class _WorkerBench:
    """A worker in this process."""

    def __init__(self, config: RunConfig) -> None:
        from fastserve.runtime.models.source import resolve_model
        from fastserve.runtime.worker import Worker
        from fastserve.runtime.worker.probe import Probe, copy_bandwidth

        assert config.model is not None
        _set_threads(config)
        num_gpu_blocks, num_host_blocks, block_size = _cache_sizes(config)
        self.model, directory = resolve_model(config.model, config.load_format)
        worker = Worker(
            self.model,
            num_gpu_blocks=num_gpu_blocks,
            num_host_blocks=num_host_blocks,
            block_size=block_size,
            device=config.device,
            dtype=config.dtype,
            model_dir=directory,
        )
        self._probe = Probe(worker)
        # Without a host pool nothing is copied, and any bandwidth will do.
        self.host_link = HostLink(copy_bandwidth(worker) or 1e9, 0.0)

    def stage_times(self, prefill_lens: Sequence[int], context_lens: Sequence[int]) -> StageTimes:
        """Of the only stage."""
        return StageTimes((self._probe.iteration_time(prefill_lens, context_lens),), 0.0)

    def send_times(self, repeats: int) -> list[tuple[int, float]]:
        """None."""
        return []

    def overhead(self, config: RunConfig, profile: Profile, folder: Path) -> float:
        """From a run of requests that arrive at once."""
        run(replace(config, rate=AT_ONCE, num_requests=_CALIBRATION_REQUESTS), folder)
        return time_between_iterations(folder)

    def start_clone(self) -> AbstractContextManager[None]:
        """None."""
        return nullcontext()

    def frozen(self) -> AbstractContextManager[None]:
        """Nothing to freeze."""
        return nullcontext()

    def close(self) -> None:
        """Nothing to end."""


class _RanksBench:
    """Ranks as processes of their own."""

    def __init__(self, config: RunConfig) -> None:
        import torch

        from fastserve.profiling.measure import host_link
        from fastserve.runtime.models.source import resolve_model
        from fastserve.runtime.worker.probe import StageProbe

        assert config.model is not None
        self._config = config
        self.model, _ = resolve_model(config.model, config.load_format)
        self._bytes_per_token = self.model.hidden_size * getattr(torch, config.dtype).itemsize
        self._ranks = self._start()
        self._probe = StageProbe(self._ranks)
        num_host_blocks = self._ranks.num_host_blocks
        kv_bytes_per_token = self.model.kv_bytes_per_token(config.dtype)
        self.host_link = (
            host_link(self._ranks.copy_time, self._ranks, kv_bytes_per_token)[0]
            if num_host_blocks
            else HostLink(1e9, 0.0)
        )

    def _start(self) -> RankGroup:
        from fastserve.runtime.executors.ranks import RankGroup
        from fastserve.runtime.worker.protocol import RankConfig

        config = self._config
        options, _ = resolve_settings(config.policy, config.settings)
        num_gpu_blocks, num_host_blocks, block_size = _cache_sizes(config)
        assert config.model is not None
        return RankGroup(
            RankConfig(
                model=config.model,
                load_format=config.load_format,
                device=config.device,
                dtype=config.dtype,
                block_size=block_size,
                max_batch_size=options.max_batch_size,
                token_budget=options.token_budget,
                max_model_len=options.max_model_len,
                tensor_parallel_size=config.tensor_parallel_size,
                pipeline_parallel_size=config.pipeline_parallel_size,
                stage_layers=config.stage_layers,
                torch_threads=config.torch_threads,
                timeout_s=_RANK_TIMEOUT_S,
            ),
            num_gpu_blocks=num_gpu_blocks,
            num_host_blocks=num_host_blocks,
        )

    def stage_times(self, prefill_lens: Sequence[int], context_lens: Sequence[int]) -> StageTimes:
        """Of all stages."""
        return self._probe.stage_times(prefill_lens, context_lens)

    def send_times(self, repeats: int) -> list[tuple[int, float]]:
        """Of a decode batch, and of a prompt."""
        if self._config.pipeline_parallel_size == 1:
            return []
        return self._ranks.send_times([count * self._bytes_per_token for count in _SENT_TOKENS], repeats)

    def overhead(self, config: RunConfig, profile: Profile, folder: Path) -> float:
        """From a run with one iteration in flight: in a full pipeline none ends before the next starts."""
        from fastserve.profiling.measure import ProfileConfig, engine_time

        assert config.model is not None
        options, _ = resolve_settings(config.policy, config.settings)
        profile_config = ProfileConfig(
            config.model,
            config.load_format,
            config.device,
            config.dtype,
            options.block_size,
            max_batch_size=options.max_batch_size,
            token_budget=options.token_budget,
            tensor_parallel_size=config.tensor_parallel_size,
            pipeline_parallel_size=config.pipeline_parallel_size,
        )
        own = engine_time(profile_config, self._ranks, profile.latency, config.policy, config.profile)
        return own.overhead_s + own.overhead_per_request_s * options.max_batch_size

    @contextmanager
    def start_clone(self) -> Iterator[RankGroup]:
        """As many others."""
        with closing(self._start()) as ranks:
            yield ranks

    def frozen(self) -> AbstractContextManager[None]:
        """All of them."""
        return self._ranks.frozen()

    def close(self) -> None:
        """End them."""
        self._ranks.close()


# -- the profiler ----------------------------------------------------------------------------------------------------


class Profiler:
    """Times a grid of iterations on a bench."""

    def __init__(self, config: RunConfig, shapes: Sequence[Shape], bench: Bench) -> None:
        self._config = config
        self._bench = bench
        self._samples: dict[Shape, list[StageTimes]] = {shape: [] for shape in shapes}
        self._sends: dict[int, list[float]] = {}
        self._wall_s = self._processor_s = 0.0
        self._shapes = self._in_order()

    def warm_up(self, num_tokens: int) -> None:
        """Run prompts of 1 to `num_tokens` tokens."""
        _warm_up(self._bench.stage_times, num_tokens)

    def measure_all(self, repeats: int) -> None:
        """Go round the whole grid so many times, and once more before to warm up."""
        for shape in self._samples:
            self._bench.stage_times(*shape)
        for _ in range(repeats):
            for shape in self._samples:
                self._sample(shape)
        self._sample_sends(repeats=10)

    def measure_in_turns(self, turn: Turn) -> None:
        """Go on round the grid, for as long as there are turns."""
        _set_threads(self._config)
        turn.paused = self._bench.frozen
        for count in itertools.count(1):
            decode, other = next(self._shapes)
            left_s = turn.length_s - sum(self._sample(shape) for shape in (*[decode] * DECODES_IN_A_ROW, other))
            while left_s > 0:
                left_s -= self._sample(decode)
            if not count % SENDS_EVERY:  # At the end of a turn, when whoever was stopped has found a core again.
                self._sample_sends(repeats=2)
            turn.yield_turn()

    def forget(self) -> None:
        """Start anew; of each shape the last sample stays, so that none is without."""
        for samples in self._samples.values():
            del samples[:-1]
        self._wall_s = self._processor_s = 0.0

    def profile(self, overhead_s: float) -> Profile:
        """What was measured so far, with `overhead_s` added to every iteration.

        Of each shape the mean counts: what a run suffers from a slow spell is in its sums as well.
        """
        import torch

        config, bench = self._config, self._bench
        channel_s = statistics.mean(each.channel_s for samples in self._samples.values() for each in samples)
        bytes_per_token = bench.model.hidden_size * getattr(torch, config.dtype).itemsize
        sends = [(size, statistics.mean(seconds)) for size, seconds in self._sends.items()]
        link = StageLink(*fit_link(sends), bytes_per_token, rendezvous=True) if sends else None
        of_stages = by_stage(list(self._samples), list(self._samples.values()), link, statistics.mean)
        stages = [fit(measurements, by_batch_size=True) for measurements in of_stages]
        all_residuals = [residuals(*each) for each in zip(stages, of_stages, strict=True)]
        num_gpu_blocks, _, block_size = _cache_sizes(config)
        threads = config.torch_threads or torch.get_num_threads()
        world_size = _shape_of(config).world_size
        of_ranks = f", {world_size} ranks" if world_size > 1 else ""
        return Profile(
            name="fidelity",
            model=bench.model.name,
            hardware=f"{torch.device(config.device).type}{of_ranks}, {threads} threads",
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
                "processor_share": self._processor_share,
                "residuals": all_residuals[0],
                "later_residuals": all_residuals[1:],
            },
        )

    @property
    def _processor_share(self) -> float | None:
        """None of ranks, of which little is known: those that sum wait for others."""
        if _shape_of(self._config).world_size > 1:
            return None
        return min(1.0, self._processor_s / self._wall_s) if self._wall_s else 1.0

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
        """What a turn measures: decodes in a row, as an engine runs them, and among them an iteration with a prompt."""
        decodes = [shape for shape in self._samples if not shape[0]]
        others = [shape for shape in self._samples if shape[0]]
        return zip(itertools.cycle(decodes), itertools.cycle(others), strict=True)


def _warm_up(stage_times: Callable[[Sequence[int], Sequence[int]], StageTimes], num_tokens: int) -> None:
    """Run prompts of 1 to `num_tokens` tokens: the first time, oneDNN makes a kernel for each number."""
    for count in range(1, num_tokens + 1):
        stage_times([count], [])


def _set_threads(config: RunConfig) -> None:
    import torch

    if config.torch_threads is not None:  # torch keeps the number for each of our threads.
        torch.set_num_threads(config.torch_threads)

"""What the server tells Prometheus: counters as things happen, gauges as things stand when it asks."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, GCCollector, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric

from fastserve.engine import Engine, Observer
from fastserve.job import Job
from fastserve.request import RequestStatus
from fastserve.scheduler import Iteration
from fastserve.server.state import EngineState

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
_GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


_ENDS = (RequestStatus.FINISHED, RequestStatus.ABORTED, RequestStatus.FAILED)


class ServerMetrics(Observer):
    """Counts what the engine does, in the engine's thread; prometheus-client makes it safe to read from another."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self._standing = _Standing()
        registry.register(self._standing)

        def counter(name: str, what: str) -> Counter:
            return Counter(f"fastserve_{name}", what, registry=registry)

        ended = Counter("fastserve_requests", "Requests that left the engine", ["outcome"], registry=registry)
        self._outcomes = {status: ended.labels(status.value) for status in _ENDS}
        self._arrived = counter("requests_arrived", "Requests that entered the engine")
        self._refused = counter("requests_refused_queue_full", "Requests answered 429")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that entered the engine")
        self._output_tokens = counter("output_tokens", "Tokens generated")
        self._iterations = counter("iterations", "Iterations computed")
        self._preemptions = counter("preemptions", "Times an unfinished request lost its place in the batch")
        self._swap_out = counter("swap_out_bytes", "Cache moved from the GPU to host memory")
        self._swap_in = counter("swap_in_bytes", "Cache moved from host memory to the GPU")
        self._recomputed = counter("recomputed_tokens", "Tokens whose cache was dropped, to be computed again")
        self._ttft = Histogram(
            "fastserve_time_to_first_token_seconds", "Arrival to first token", buckets=_LATENCY_S, registry=registry
        )
        self._gap = Histogram(
            "fastserve_inter_token_seconds",
            "From one token of a request to its next",
            buckets=_GAP_S,
            registry=registry,
        )
        self._jct = Histogram(
            "fastserve_request_seconds", "Arrival to last token, of finished requests", buckets=_LATENCY_S,
            registry=registry,
        )  # fmt: skip

    def on_arrival(self, job: Job) -> None:  # noqa: D102 (an observer's)
        self._arrived.inc()
        self._prompt_tokens.inc(job.request.num_prompt_tokens)

    def on_submit(self, iteration: Iteration) -> None:  # noqa: D102
        if iteration.preempted:
            self._preemptions.inc(len(iteration.preempted))
        if iteration.swap_out:
            self._swap_out.inc(sum(transfer.num_bytes for transfer in iteration.swap_out))
        if iteration.swap_in:
            self._swap_in.inc(sum(transfer.num_bytes for transfer in iteration.swap_in))
        if iteration.dropped:
            self._recomputed.inc(sum(drop.num_lost_tokens for drop in iteration.dropped))

    def on_iteration(self, engine: Engine, iteration: Iteration, start_s: float, end_s: float) -> None:  # noqa: D102
        self._iterations.inc()

    def on_token(self, job: Job, token: int, at_s: float, previous_s: float | None) -> None:  # noqa: D102
        self._output_tokens.inc()
        if previous_s is None:
            self._ttft.observe(at_s - job.request.arrival_s)
        else:
            self._gap.observe(at_s - previous_s)

    def on_done(self, job: Job) -> None:  # noqa: D102
        request = job.request
        self._outcomes[request.status].inc()
        if request.status is RequestStatus.FINISHED and job.finished_s is not None:
            self._jct.observe(job.finished_s - request.arrival_s)

    def refused(self, num_requests: int) -> None:
        """So many requests found the queue full."""
        self._refused.inc(num_requests)

    def totals(self) -> dict[str, int]:
        """The counters that the live page shows."""
        counters = {
            "requests": self._arrived,
            **{status.value: self._outcomes[status] for status in _ENDS},
            "output_tokens": self._output_tokens,
            "iterations": self._iterations,
            "preemptions": self._preemptions,
            "swap_out_bytes": self._swap_out,
            "swap_in_bytes": self._swap_in,
        }
        return {name: int(next(iter(counter.collect())).samples[0].value) for name, counter in counters.items()}

    def exposition(self, state: EngineState | None) -> bytes:
        """All of it in Prometheus' text format; without gauges of the engine where there is no state of it."""
        self._standing.state = state
        return generate_latest(self.registry)


class _Standing:
    """Gauges of the engine, from its state."""

    state: EngineState | None = None

    def collect(self) -> Iterable[Metric]:
        state = self.state
        if state is None:
            return
        queues = GaugeMetricFamily(
            "fastserve_queue_length", "Unfinished requests in each queue, the running ones too", labels=["level"]
        )
        for level in state["queues"]:
            queues.add_metric([str(level["level"])], level["fresh"] + level["resident"] + level["away"])
        yield queues
        running = len(state["running"])
        yield GaugeMetricFamily("fastserve_requests_running", "Requests in the current batch", value=running)
        waiting = sum(level["fresh"] + level["resident"] + level["away"] for level in state["queues"]) - running
        yield GaugeMetricFamily("fastserve_requests_waiting", "Requests in no batch", value=max(0, waiting))
        blocks = GaugeMetricFamily("fastserve_kv_blocks", "Blocks of the KV cache", labels=["pool", "state"])
        for pool, sizes in (("gpu", state["gpu"]), ("host", state["host"])):
            blocks.add_metric([pool, "free"], sizes["free"])
            blocks.add_metric([pool, "used"], sizes["blocks"] - sizes["free"])
        yield blocks
        moving = GaugeMetricFamily(
            "fastserve_kv_blocks_moving", "GPU blocks whose contents are on their way", labels=["direction"]
        )
        for direction, count in state["moving"].items():
            moving.add_metric([direction], count)
        yield moving

"""Metrics for Prometheus.

The engine's thread only adds to numbers, since it does so for every token. They become Prometheus' metrics when it
asks for them, together with the engine's state at that time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fastserve.core.request import RequestStatus
from fastserve.engine import EngineView, Job, Observer
from fastserve.scheduler import Iteration
from fastserve.server.monitoring.state import EngineState

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
_GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_COUNTERS = {
    "requests": "Requests that entered the engine",
    "refused": "Requests answered 429 because the queue was full",
    "prompt_tokens": "Prompt tokens of requests that entered the engine",
    "output_tokens": "Tokens generated",
    "iterations": "Iterations computed",
    "preemptions": "Times an unfinished request lost its place in the batch",
    "swap_out_bytes": "Cache moved from the GPU to host memory",
    "swap_in_bytes": "Cache moved from host memory to the GPU",
    "recomputed_tokens": "Tokens whose cache was dropped and must be recomputed",
    "cached_tokens": "Tokens found in the cache instead of computed",
}
_NAMES = {"requests": "requests_arrived", "refused": "requests_refused_queue_full"}
"""Counters whose name in Prometheus says more."""
_MODEL = "model_name"
"""Label of every metric."""
_OUTCOMES = tuple(status.value for status in (RequestStatus.FINISHED, RequestStatus.ABORTED, RequestStatus.FAILED))


class Health(NamedTuple):
    """Health of the engine's thread."""

    stalled: bool
    """Whether the standstill is longer than --stall-timeout."""
    standstill_s: float
    """Seconds since an iteration ended, while requests wait."""


class ServerMetrics(Observer, Collector):
    """Counts what the engine does, in the engine's thread, and collects it for Prometheus."""

    def __init__(self) -> None:
        self.totals = dict.fromkeys((*_COUNTERS, *_OUTCOMES), 0)
        """Counters since the start, and requests by outcome."""
        self._ttft, self._gap, self._jct = _Histogram(_LATENCY_S), _Histogram(_GAP_S), _Histogram(_LATENCY_S)
        self._answers: Counter[tuple[str, str, int]] = Counter()
        """HTTP responses by method, route and status, counted by the event loop."""
        self._model_name = ""
        self._state: EngineState | None = None
        self._health = Health(False, 0.0)
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        self._registry.register(self)

    def exposition(self, model_name: str, state: EngineState, health: Health) -> bytes:
        """Return all metrics in Prometheus' text format. `state` is the engine's."""
        self._model_name, self._state, self._health = model_name, state, health
        return generate_latest(self._registry)

    # -- counting ------------------------------------------------------------------------------------------------

    def refused(self, num_requests: int) -> None:
        """Count requests that found the queue full."""
        self.totals["refused"] += num_requests

    def answered(self, method: str, route: str, status: int) -> None:
        """Count an HTTP response. `route` is a path of /openapi.json or `other`, so that their number is bounded."""
        self._answers[method, route, status] += 1

    def on_arrival(self, job: Job) -> None:  # noqa: D102 (of Observer)
        self.totals["requests"] += 1
        self.totals["prompt_tokens"] += job.request.num_prompt_tokens

    def on_submit(self, iteration: Iteration) -> None:  # noqa: D102 (of Observer)
        totals = self.totals
        totals["preemptions"] += len(iteration.preempted)
        totals["swap_out_bytes"] += sum(transfer.num_bytes for transfer in iteration.swap_out)
        totals["swap_in_bytes"] += sum(transfer.num_bytes for transfer in iteration.swap_in)
        totals["recomputed_tokens"] += sum(drop.num_recomputed_tokens for drop in iteration.dropped)
        totals["recomputed_tokens"] += sum(reuse.num_recomputed_tokens for reuse in iteration.reused)
        totals["cached_tokens"] += sum(reuse.num_found_tokens for reuse in iteration.reused)

    def on_iteration(self, engine: EngineView, iteration: Iteration, start_s: float, end_s: float) -> None:  # noqa: D102
        self.totals["iterations"] += 1

    def on_token(self, job: Job, token: int, at_s: float, previous_s: float | None) -> None:  # noqa: D102 (of Observer)
        self.totals["output_tokens"] += 1
        if previous_s is None:
            self._ttft.add(at_s - job.request.arrival_s)
        else:
            self._gap.add(at_s - previous_s)

    def on_done(self, job: Job) -> None:  # noqa: D102 (of Observer)
        request = job.request
        self.totals[request.status.value] += 1
        if request.status is RequestStatus.FINISHED and job.finished_s is not None:
            self._jct.add(job.finished_s - request.arrival_s)

    # -- collecting ----------------------------------------------------------------------------------------------

    def collect(self) -> Iterable[Metric]:  # noqa: D102 (of Collector)
        for metric in self._metrics():
            for sample in metric.samples:
                sample.labels[_MODEL] = self._model_name
            yield metric

    def _metrics(self) -> Iterable[Metric]:
        for name, what in _COUNTERS.items():
            yield CounterMetricFamily(f"fastserve_{_NAMES.get(name, name)}", what, value=self.totals[name])
        ended = CounterMetricFamily("fastserve_requests", "Requests that left the engine", labels=["outcome"])
        for outcome in _OUTCOMES:
            ended.add_metric([outcome], self.totals[outcome])
        yield ended
        yield self._ttft.metric("time_to_first_token_seconds", "Arrival to first token")
        yield self._gap.metric("inter_token_seconds", "From one token of a request to its next")
        yield self._jct.metric("request_seconds", "Arrival to last token, of finished requests")
        answers = CounterMetricFamily(
            "fastserve_http_requests",
            "HTTP requests answered; status 499: the client disconnected before the answer",
            labels=["method", "path", "status"],
        )
        for (method, route, status), count in self._answers.items():
            answers.add_metric([method, route, str(status)], count)
        yield answers
        yield GaugeMetricFamily(
            "fastserve_engine_stalled",
            "1 if requests wait and no iteration has ended for longer than --stall-timeout",
            value=int(self._health.stalled),
        )
        yield GaugeMetricFamily(
            "fastserve_engine_standstill_seconds",
            "Time since an iteration ended, while requests wait",
            value=self._health.standstill_s,
        )
        if self._state is not None:
            yield from _state_metrics(self._state)


class _Histogram:
    """Counts values by the bound that they fall below."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def metric(self, name: str, what: str) -> HistogramMetricFamily:
        names = [*(str(bound) for bound in self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        return HistogramMetricFamily(f"fastserve_{name}", what, buckets=buckets, sum_value=self._sum)


def _state_metrics(state: EngineState) -> Iterable[Metric]:
    queues = GaugeMetricFamily(
        "fastserve_queue_length", "Unfinished requests in each queue, running ones included", labels=["level"]
    )
    unfinished = 0
    for level in state["queues"]:
        size = level["fresh"] + level["resident"] + level["away"]
        unfinished += size
        queues.add_metric([str(level["level"])], size)
    yield queues
    running = len(state["running"])
    yield GaugeMetricFamily("fastserve_requests_running", "Requests in the current batch", value=running)
    yield GaugeMetricFamily(
        "fastserve_requests_waiting",
        "Unfinished requests outside the current batch",
        value=max(0, unfinished - running),
    )
    blocks = GaugeMetricFamily("fastserve_kv_blocks", "Blocks of the KV cache", labels=["pool", "state"])
    for pool, sizes in (("gpu", state["gpu"]), ("host", state["host"])):
        blocks.add_metric([pool, "free"], sizes["free"])
        blocks.add_metric([pool, "used"], sizes["blocks"] - sizes["free"])
    yield blocks
    moving = GaugeMetricFamily(
        "fastserve_kv_blocks_moving", "GPU blocks whose contents are being transferred", labels=["direction"]
    )
    for direction, count in state["moving"].items():
        moving.add_metric([direction], count)
    yield moving

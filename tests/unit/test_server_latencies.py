"""Percentiles of the live page's last minute, by nearest rank."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

from fastserve.core.request import Request, RequestStatus, SamplingParams
from fastserve.engine import Job
from fastserve.server.monitoring.latencies import Latencies, summarize


def test_percentiles_are_values_that_occurred() -> None:
    assert summarize([]) == {"count": 0, "mean": None, "p50": None, "p95": None, "p99": None}
    assert summarize([3.0]) == {"count": 1, "mean": 3.0, "p50": 3.0, "p95": 3.0, "p99": 3.0}
    found = summarize([float(number) for number in range(200, 0, -1)])
    assert found == {"count": 200, "mean": 100.5, "p50": 100.0, "p95": 190.0, "p99": 198.0}


def finished(arrival_s: float, first_s: float, last_s: float, num_output_tokens: int) -> Job:
    request = Request.from_tokens("a", arrival_s, [1])
    request.num_tokens = 1 + num_output_tokens
    request.status = RequestStatus.FINISHED
    job = Job(request, SamplingParams(max_tokens=num_output_tokens))
    job.first_token_s, job.last_token_s, job.finished_s = first_s, last_s, last_s
    return job


def test_what_is_older_than_a_minute_is_left_out() -> None:
    latencies = Latencies()
    for job in (finished(0.0, 0.5, 2.5, 5), finished(50.0, 51.0, 51.0, 1), finished(60.0, 62.0, 65.0, 4)):
        assert job.first_token_s is not None
        latencies.first_token(job, job.first_token_s)
        latencies.done(job)
    aborted = finished(60.0, 61.0, 61.0, 1)
    aborted.request.status = RequestStatus.ABORTED
    latencies.done(aborted)
    assert latencies.copy(60.0) == {"ttft_s": [0.5, 1.0, 2.0], "tpot_s": [0.5, 1.0], "jct_s": [2.5, 1.0, 5.0]}
    assert latencies.copy(61.0) == {"ttft_s": [1.0, 2.0], "tpot_s": [0.5, 1.0], "jct_s": [2.5, 1.0, 5.0]}
    assert latencies.copy(200.0) == {"ttft_s": [], "tpot_s": [], "jct_s": []}

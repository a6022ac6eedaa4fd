"""/metrics as Prometheus reads it: what is counted adds up with what has become of the requests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families

from support.servers import RunningServer, running, simulated

Samples = dict[tuple[str, str], float]
"""Values by name and labels."""


def scrape(server: RunningServer) -> Samples:
    reply = server.get("/metrics")
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(reply.content.decode()))
    assert len({family.name for family in families}) == len(families)
    assert all(family.documentation for family in families)
    return {
        (
            sample.name.removeprefix("fastserve_"),
            ",".join(value for name, value in sample.labels.items() if name != "model_name"),
        ): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.mark.parametrize("policy", ["fastserve", "mlfq", "fastserve-fcfs", "vllm", "orca"])
def test_counters_are_the_sums_over_the_requests(policy: str) -> None:
    options: dict[str, Any] = {}
    if policy in ("fastserve", "mlfq"):
        options = {"alpha_s": 0.01, "quantum_base_s": 0.001}
    if policy == "mlfq":
        options |= {"swap": "recompute"}
    build = partial(simulated, policy, options, iteration_s=0.0002, num_blocks=14, num_host_blocks=30, max_batch_size=3)
    lengths = [1, 100, 60, 30, 90, 100, 75, 2]
    with running(build) as server, ThreadPoolExecutor(len(lengths)) as clients:
        with server.held_when():
            answers = [clients.submit(server.post, {"prompt": [1] * 20, "max_tokens": n}) for n in lengths]
            left = server.stream(prompt=[1] * 20, max_tokens=200)
            server.until_unfinished(9)
            left.close()
            server.until_unfinished(8)
        assert all(answer.result().status == 200 for answer in answers)
        server.check_empty()
        found = scrape(server)
        metrics = [job.metrics for job in server.watcher.jobs.values()]
        expected = {
            ("requests_total", "finished"): 8,
            ("requests_total", "aborted"): 1,
            ("requests_total", "failed"): 0,
            ("requests_arrived_total", ""): 9,
            ("requests_refused_queue_full_total", ""): 0,
            ("prompt_tokens_total", ""): 180,
            ("output_tokens_total", ""): sum(one.output_tokens for one in metrics),
            ("preemptions_total", ""): sum(one.preemptions for one in metrics),
            ("swap_out_bytes_total", ""): sum(one.swap_out_bytes for one in metrics),
            ("swap_in_bytes_total", ""): sum(one.swap_in_bytes for one in metrics),
            ("recomputed_tokens_total", ""): sum(one.recomputed_tokens for one in metrics),
            ("cached_tokens_total", ""): sum(one.cached_tokens for one in metrics),
            ("time_to_first_token_seconds_count", ""): sum(one.output_tokens > 0 for one in metrics),
            ("inter_token_seconds_count", ""): sum(max(0, one.output_tokens - 1) for one in metrics),
            ("request_seconds_count", ""): 8,
            ("kv_blocks", "gpu,free"): 14,
            ("kv_blocks", "gpu,used"): 0,
            ("kv_blocks", "host,free"): 30,
            ("kv_blocks", "host,used"): 0,
            ("kv_blocks_moving", "out"): 0,
            ("kv_blocks_moving", "in"): 0,
            ("requests_running", ""): 0,
            ("requests_waiting", ""): 0,
        }
        assert {key: found[key] for key in expected} == expected
        completed = [one.finished_s - one.arrival_s for one in metrics if one.status == "finished"]
        assert found["request_seconds_sum", ""] == pytest.approx(sum(completed))
        first = [one.first_token_s - one.arrival_s for one in metrics if one.output_tokens]
        assert found["time_to_first_token_seconds_sum", ""] == pytest.approx(sum(first))
    assert (found["swap_out_bytes_total", ""] > 0) == (policy in ("fastserve", "fastserve-fcfs"))
    assert (found["recomputed_tokens_total", ""] > 0) == (policy in ("mlfq", "vllm"))
    assert (found["preemptions_total", ""] > 0) == (policy != "orca")


def test_gauges_are_the_engines_state() -> None:
    build = partial(simulated, "fastserve", {"swap": "reactive"}, iteration_s=0.0005, num_blocks=12, max_batch_size=2)
    with running(build) as server, ThreadPoolExecutor() as clients:
        with server.held_when():
            # Each request fills the cache before it ends.
            streams = [server.stream(prompt=[1] * length, max_tokens=185 - length) for length in (4, 20, 40, 80)]
            server.until_unfinished(4)
        queue = server.engine.scheduler.queue
        with server.held_when(lambda: any(away for *_, away in queue.sizes())):
            asked = clients.submit(scrape, server)
            server.until_commanded()
        found = asked.result()
        assert sum(value for (name, _), value in found.items() if name == "queue_length") == 4
        assert found["requests_running", ""] + found["requests_waiting", ""] == 4
        assert found["kv_blocks", "gpu,free"] + found["kv_blocks", "gpu,used"] == 12
        assert found["kv_blocks", "host,free"] + found["kv_blocks", "host,used"] == 4096
        assert found["kv_blocks", "host,used"] > 0
        for stream in streams:
            stream.close()
        server.check_empty()


def test_each_level_with_requests_has_a_queue_length() -> None:
    # One request runs; the others are in the levels of their prompts.
    build = partial(simulated, "fastserve", {"quantum_base_s": 0.001}, iteration_s=0.0005, max_batch_size=1)
    with running(build) as server:
        with server.held_when():
            streams = [server.stream(prompt=[1], max_tokens=50_000) for _ in range(3)]
            server.until_unfinished(3)
        server.until(lambda: server.watcher.num_tokens.total() > 3)
        found = scrape(server)
        assert sum(value for (name, _), value in found.items() if name == "queue_length") == 3
        assert (found["requests_running", ""], found["requests_waiting", ""]) == (1, 2)
        for stream in streams:
            stream.close()
        server.check_empty()
        assert not any(name == "queue_length" for name, _ in scrape(server))

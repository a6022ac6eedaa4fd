"""One simulation by AISimulate: a script for `peers.py`, run in an environment that has the package.

Usage: `python _peer_aisimulate.py REQUESTS.csv SETTINGS`, the settings as JSON. Prints one line of JSON.

The package's Python layer needs jax, pandas and more; its native runtime needs nothing and takes the same
specification as JSON. The scheduler is its model of vLLM's, with chunked prefill and without shared prefixes, on one
worker. Its fixed timing adds the time of a prefill and that of a decode step where an iteration has both.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def convert(path: Path) -> list[dict[str, Any]]:
    """Read the request file; return AISimulate's requests."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {
                "id": str(index),
                "arrival_time_ms": float(row["arrival_s"]) * 1000,
                "input_tokens": int(row["prompt_tokens"]),
                "output_tokens": int(row["output_tokens"]),
                "metadata": None,
            }
            for index, row in enumerate(csv.DictReader(file))
        ]


def specification(rows: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what AISimulate's runtime takes: one worker, its scheduler, fixed times, the requests."""
    rank = {
        "backend": "vllm",
        "num_gpu_blocks": settings["num_gpu_blocks"],
        "block_size": settings["block_size"],
        "max_num_seqs": settings["max_batch_size"],
        "max_num_batched_tokens": settings["token_budget"],
        "enable_chunked_prefill": True,
        "enable_prefix_caching": False,
        "timing_model": {
            "type": "fixed",
            "prefill_ms": settings["prefill_s"] * 1000,
            "decode_ms": settings["decode_s"] * 1000,
        },
    }
    return {
        "version": 1,
        "topology": {"kind": "aggregated", "workers": {"initial_workers": 1, "startup_delay_ms": 0.0}},
        "engine": {
            "dp_size": 1,
            "tensor_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "num_gpu_blocks_is_explicit": True,
            "rank": rank,
        },
        "adapters": {
            "placement": {"provider": "round_robin", "config": None},
            "scaling": {"provider": "none", "config": None},
        },
        "max_sim_time_ms": None,
        "max_in_flight": None,
        "record_per_request": settings["times"],
        "sla": {},
        "requests": rows,
    }


def simulate(rows: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Run the simulation. Timed from JSON in to JSON out: the runtime offers no other way in."""
    from aisimulate import _runtime

    payload = json.dumps(specification(rows, settings))
    began, began_cpu = time.perf_counter(), time.process_time()
    text = _runtime.run_replay_json(payload)
    answer: dict[str, Any] = {
        "wall_s": time.perf_counter() - began,
        "cpu_s": time.process_time() - began_cpu,
        "version": version("aisimulate"),
        "python": sys.version.split()[0],
    }
    report = json.loads(text)
    answer["own_wall_s"] = report["wall_time_ms"] / 1000
    if settings["times"]:
        by_id = {each["request_id"]: each for each in report["per_request"]}
        records = [by_id[row["id"]] for row in rows]
        answer["preemptions"] = sum(each["readmission_count"] for each in records)
        answer["first_token_s"] = [each["first_token_ms"] / 1000 for each in records]
        answer["finished_s"] = [each["last_token_ms"] / 1000 for each in records]
    return answer


if __name__ == "__main__":
    print(json.dumps(simulate(convert(Path(sys.argv[1])), json.loads(sys.argv[2]))))

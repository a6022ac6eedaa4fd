"""guidellm, as it is, measures our server: the tokens it counts and the first token it times are the server's."""

from __future__ import annotations

import json
import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fastserve.core.tokenizer import BUILTIN, BuiltinTokenizer
from support.clients import command_of
from support.servers import RunningServer, running, simulated

NUM_REQUESTS, PROMPT, OUTPUT = 48, 40, 10
WITHIN_S = 300


def measured(server: RunningServer, path: str, folder: Path) -> dict[str, Any]:
    """guidellm's metrics of requests that come as soon as one of 24 has ended."""
    out = folder / "out.json"
    command = [
        command_of("guidellm"), "run", "--backend", f"kind=openai_http,target={server.url},request_format={path}",
        "--tokenizer", f"kind=huggingface_auto,model={BUILTIN}",
        "--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}",
        "--profile", "kind=concurrent,streams=24", "--constraint", f"kind=max_requests,count={NUM_REQUESTS}",
        "--disable-console-interactive", "--output", f"kind=json,path={out}",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    metrics: dict[str, Any] = json.loads(out.read_text())["benchmarks"][0]["metrics"]
    return metrics


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm_counts_and_times_as_the_server_does(tmp_path: Path, path: str) -> None:
    # Two requests run at a time: most wait long for their first token.
    build = partial(
        simulated, "fastserve-fcfs", iteration_s=0.005, max_batch_size=2, max_model_len=2048,
        tokenizer=BuiltinTokenizer(),
    )  # fmt: skip
    with running(build) as server:
        metrics = measured(server, path, tmp_path)
        families = text_string_to_metric_families(server.get("/metrics").content.decode())
        counted = {sample.name: sample.value for family in families for sample in family.samples}
    assert metrics["request_totals"] == {
        "successful": NUM_REQUESTS,
        "errored": 0,
        "incomplete": 0,
        "total": NUM_REQUESTS,
    }
    told = {name: metrics[name]["successful"] for name in ("output_token_count", "prompt_token_count")}
    assert told["output_token_count"]["total_sum"] == counted["fastserve_output_tokens_total"] == NUM_REQUESTS * OUTPUT
    assert told["prompt_token_count"]["total_sum"] == counted["fastserve_prompt_tokens_total"]
    name = "fastserve_time_to_first_token_seconds"
    first_token_ms = 1000 * counted[f"{name}_sum"] / counted[f"{name}_count"]
    assert first_token_ms > 100
    theirs = metrics["time_to_first_token_ms"]["successful"]["mean"]
    assert first_token_ms <= theirs <= 1.5 * first_token_ms + 200

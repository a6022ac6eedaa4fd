"""Check our server with an unchanged `vllm bench serve`: requests succeed, and both sides measure the same.

Starts `fastserve serve` on a small model, and on a busy simulation, and calls the client from vLLM's environment
(.venv-vllm, which `make real-vllm` installs) with different data sets, arrivals and prompts. The exit status is 0 if
every request succeeds, and both sides count the same tokens and measure the same time to first token.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from baselines.external.environment import python_of
from baselines.external.process import ServerProcess, free_port
from fastserve.core.errors import ConfigError, FastServeError
from fastserve.core.tokenizer import BUILTIN
from harness.analysis.files import read_json
from harness.studies.model_folder import write_model_folder

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": 1024,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 128,
    "max_position_embeddings": 512,
    "word_embed_proj_dim": 64,
}
_TIMEOUT_S = 300.0
_MOST_ADDED, _MOST_ADDED_S, _MOST_ADDED_EACH_S = 0.5, 0.05, 0.002
"""Upper bounds on what connections, HTTP and the client add to a mean time to first token: a share, seconds, and
seconds for each request, since requests sent together wait for each other in the client."""
_TOTALS = {
    "fastserve_output_tokens_total": "output",
    "fastserve_prompt_tokens_total": "prompt",
    "fastserve_time_to_first_token_seconds_count": "first_tokens",
    "fastserve_time_to_first_token_seconds_sum": "first_tokens_s",
}


@dataclass(frozen=True)
class Call:
    """One call of the client."""

    name: str
    num_prompts: int
    arguments: tuple[str, ...]


_CHAT = ("--backend", "openai-chat", "--endpoint", "/v1/chat/completions")
_RANDOM = ("--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "24")
_AT_ONCE = (*_RANDOM, "--request-rate", "inf")


@dataclass(frozen=True)
class Served:
    """One of our servers: what it serves, the tokenizer for its clients, and the calls that it answers."""

    name: str
    arguments: tuple[str, ...]
    tokenizer: Path
    calls: tuple[Call, ...]


def small_model(model: Path, trace: Path, policy: str) -> Served:
    """A small model, with different data sets, arrivals, prompts and limits; the timed data set is the file `trace`."""
    timed = ("--dataset-name", "timed_trace", "--dataset-path", str(trace), "--timed-trace-sec-multiplier", "0.001")
    calls = (
        Call("all at once", 32, _AT_ONCE),
        Call("Poisson arrivals", 24, (*_RANDOM, "--request-rate", "20")),
        Call("bursty arrivals, other lengths", 24, (
            *_RANDOM, "--random-range-ratio", "0.5", "--request-rate", "20", "--burstiness", "0.3",
        )),
        Call("at most four at a time, backend vllm", 16, (*_RANDOM, "--max-concurrency", "4", "--backend", "vllm")),
        Call("sampled, chat", 16, (*_RANDOM, *_CHAT, "--temperature", "0.8", "--top-p", "0.9")),
        # More than a batch, so that most requests wait for their first token.
        Call("many at once", 120, _AT_ONCE),
        Call("many at once, chat", 120, (*_AT_ONCE, *_CHAT)),
        Call("timed trace, token ids", 20, timed),
    )  # fmt: skip
    arguments = ("--model", str(model), "--policy", policy, "--set", "num_gpu_blocks=256")
    return Served("small model", arguments, model, calls)


def busy_simulation() -> Served:
    """A simulation with a small batch, so that most requests wait for seconds, and with the built-in tokenizer."""
    calls = (Call("simulated, busy", 40, _AT_ONCE), Call("simulated, busy, chat", 40, (*_AT_ONCE, *_CHAT)))
    arguments = ("--backend", "sim", "--profile", "a100-80g/opt-13b-tp1", "--policy", "fastserve-fcfs")
    return Served("simulation", (*arguments, "--set", "max_batch_size=4"), BUILTIN, calls)


def write_trace(path: Path) -> None:
    """Write twenty requests in two seconds, in the form of public traces: chunks of 16 tokens, some of them shared."""
    rows = [
        {"timestamp": 100 * i, "input_length": 16 * (1 + i % 5), "output_length": 4 + 3 * i, "hash_ids": hashes}
        for i in range(20)
        for hashes in [[0, *range(10 * i + 1, 10 * i + 1 + i % 5)]]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def carry_out(call: Call, vllm: Path, url: str, tokenizer: Path, folder: Path) -> Mapping[str, Any]:
    """Run the client and return its result. Raises ConfigError with its last lines if it fails."""
    command = [str(vllm / "bin" / "vllm"), "bench", "serve", "--base-url", url, "--tokenizer", str(tokenizer)]
    if "--backend" not in call.arguments:
        command += ["--backend", "openai"]
    # Without the client's first request, a trial that the client does not count.
    command += ["--num-prompts", str(call.num_prompts), "--ready-check-timeout-sec", "0", "--disable-tqdm"]
    command += ["--save-result", "--result-dir", str(folder), "--result-filename", "result.json", *call.arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        last = "\n  ".join((done.stdout + done.stderr).splitlines()[-20:])
        raise ConfigError(f"{call.name}: `{' '.join(command)}` ended with status {done.returncode}:\n  {last}")
    return read_json(folder / "result.json")  # type: ignore[no-any-return]


def counted(url: str) -> dict[str, float]:
    """Read the server's totals: tokens, finished requests, and first tokens with their times in seconds."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    connection.request("GET", "/metrics")
    families = text_string_to_metric_families(connection.getresponse().read().decode())
    totals = dict.fromkeys(("finished", *_TOTALS.values()), 0.0)
    for sample in (sample for family in families for sample in family.samples):
        if sample.name in _TOTALS:
            totals[_TOTALS[sample.name]] = sample.value
        elif sample.name == "fastserve_requests_total" and sample.labels.get("outcome") == "finished":
            totals["finished"] = sample.value
    return totals


def ttft_s(ours: Mapping[str, float]) -> float:
    """Mean time to first token in seconds, by the server's counters."""
    return ours["first_tokens_s"] / ours["first_tokens"] if ours["first_tokens"] else math.nan


def disagreements(call: Call, result: Mapping[str, Any], ours: Mapping[str, float]) -> list[str]:
    """List the disagreements; `ours` are the server's counts during the call."""
    pairs = {
        "requests": (result["completed"], call.num_prompts, ours["finished"]),
        "output tokens": (result["total_output_tokens"], ours["output"]),
        "prompt tokens": (result["total_input_tokens"], ours["prompt"]),
    }
    wrong = [f"{what}: {' and '.join(map(str, values))}" for what, values in pairs.items() if len(set(values)) > 1]
    theirs, least = result["mean_ttft_ms"] / 1000, ttft_s(ours)
    # The client's clock starts before the server's and stops after it.
    most = least * (1 + _MOST_ADDED) + _MOST_ADDED_S + call.num_prompts * _MOST_ADDED_EACH_S
    if not least <= theirs <= most:
        wrong.append(f"mean time to first token: {1000 * theirs:.1f} ms and {1000 * least:.1f} ms")
    return wrong


def drive(vllm: Path, policy: str, chosen: Sequence[str]) -> bool:
    """Make all calls whose names contain one of `chosen`, and print the results; return whether all agree."""
    if not python_of(vllm).exists():
        raise ConfigError(f"vLLM is not installed at {vllm}; `make real-vllm` installs it")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model_folder(ARCHITECTURE, folder / "model")
        write_trace(folder / "trace.jsonl")
        wrong = 0
        for served in (small_model(folder / "model", folder / "trace.jsonl", policy), busy_simulation()):
            calls = [call for call in served.calls if not chosen or any(part in call.name for part in chosen)]
            if calls:
                wrong += _drive(vllm, served, calls, folder)
    return not wrong


def _drive(vllm: Path, served: Served, calls: Sequence[Call], folder: Path) -> int:
    """Make the calls and print the results; return the number of calls that disagree."""
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "fastserve.cli", "serve", *served.arguments]
    command += ["--port", str(urlsplit(url).port), "--no-page"]
    num_wrong = 0
    with ServerProcess("fastserve serve", command, url, folder / "server.log") as server:
        server.wait_until_ready(120)
        for call in calls:
            before = counted(url)
            result = carry_out(call, vllm, url, served.tokenizer, folder)
            ours = {what: total - before[what] for what, total in counted(url).items()}
            wrong = disagreements(call, result, ours)
            num_wrong += bool(wrong)
            print(
                f"{call.name}: {result['completed']} of {call.num_prompts} requests, "
                f"{result['total_output_tokens']} tokens, TTFT {result['mean_ttft_ms']:.1f} ms "
                f"(the server's {1000 * ttft_s(ours):.1f} ms), "
                f"TPOT {result['mean_tpot_ms']:.2f} ms: {'; '.join(wrong) or 'as the server counts'}",
                flush=True,
            )
    return num_wrong


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, default=ROOT / ".venv-vllm", help="the environment vLLM is installed in")
    parser.add_argument("--policy", default="fastserve", help="of our server")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="calls whose names contain it")
    options = parser.parse_args()
    try:
        sys.exit(0 if drive(options.vllm, options.policy, options.only) else 1)
    except FastServeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""A server under many requests, a tenth of whose clients go away: its memory stays flat and no block is lost.

`fastserve serve` as its own process, a simulated engine whose cache is too small for the batch, so that requests are
swapped, and clients who stream, wait for whole answers, or hang up: before the first token, between tokens, or while
they wait for the whole. Checked: every complete answer has its tokens once, in order; in the end every request has
finished or was aborted, and all blocks are free; resident memory after the first fifth against the end.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from fastserve.latency import DecodeFit, FittedLatency, PrefillFit
from server import PROFILE

FAST = dataclasses.replace(
    PROFILE,
    name="soak",
    stage=FittedLatency(PrefillFit(0.002, 0.0, 0.0), (DecodeFit(0.002, 0.0, 0.0),)),
    kv_bytes_per_token=100_000,
)
SETTINGS = ("max_batch_size=16", "num_gpu_blocks=64", "num_host_blocks=512")
MOST_GROWTH = 1.15


@dataclass
class Counts:
    """What became of the requests, and the server's memory on the way."""

    outcomes: Counter[str] = field(default_factory=Counter)
    resident_bytes: list[int] = field(default_factory=list)


async def ask(session: aiohttp.ClientSession, draw: random.Random, disconnects: float) -> str:
    """One request; returns what became of it. ValueError for an answer with a wrong token."""
    num_tokens = draw.randint(1, 24)
    stream, leaves = draw.random() < 0.8, draw.random() < disconnects
    body = {
        "prompt": [1] * draw.randint(1, 48), "max_tokens": num_tokens, "stream": stream, "return_token_ids": True,
    }  # fmt: skip
    after = draw.randrange(num_tokens) if leaves else None
    async with asyncio.timeout(draw.random() * 0.05 if leaves and not stream else None):
        async with session.post("/v1/completions", json=body) as response:
            response.raise_for_status()
            if not stream:
                tokens = (await response.json())["choices"][0]["token_ids"]
            else:
                tokens = []
                async for line in response.content:
                    if len(tokens) == after:
                        response.close()
                        return "left"
                    if line.startswith(b"data: {"):
                        tokens += json.loads(line[6:])["choices"][0]["token_ids"]
    if tokens != list(range(num_tokens)):
        raise ValueError(f"tokens {tokens}, not 0 to {num_tokens - 1}")
    return "finished"


async def soak(url: str, server: psutil.Process, arguments: argparse.Namespace) -> Counts:
    """Send everything, so many at a time."""
    counts, left = Counts(), iter(range(arguments.requests))
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector) as session:

        async def client(seed: int) -> None:
            draw = random.Random(seed)
            for i in left:
                try:
                    counts.outcomes[await ask(session, draw, arguments.disconnects)] += 1
                except TimeoutError:
                    counts.outcomes["left"] += 1
                if i % (arguments.requests // 20) == 0:
                    counts.resident_bytes.append(server.memory_info().rss)

        await asyncio.gather(*(client(seed) for seed in range(arguments.clients)))
        for _ in range(100):  # The last aborts may be on their way.
            values = await metrics(session)
            if not values["used"]:
                break
            await asyncio.sleep(0.05)
        check(values, arguments.requests)
        print(
            f"server: {values['finished']:.0f} finished, {values['aborted']:.0f} aborted, {values['preemptions']:.0f} "
            f"preemptions, {values['swapped'] / 1e9:.1f} GB swapped; all blocks are free"
        )
    return counts


async def metrics(session: aiohttp.ClientSession) -> dict[str, float]:
    """The counts that are checked."""
    async with session.get("/metrics") as response:
        families = list(text_string_to_metric_families(await response.text()))
    samples = [sample for family in families for sample in family.samples]
    values = {sample.labels["outcome"]: sample.value for sample in samples if "outcome" in sample.labels}
    named = {sample.name: sample.value for sample in samples}
    values["used"] = sum(sample.value for sample in samples if sample.labels.get("state") == "used")
    values["preemptions"] = named["fastserve_preemptions_total"]
    values["swapped"] = named["fastserve_swap_out_bytes_total"] + named["fastserve_swap_in_bytes_total"]
    return values


def check(values: dict[str, float], num_requests: int) -> None:
    """SystemExit if a request or a block is missing."""
    if values["used"]:
        raise SystemExit(f"error: {values['used']:.0f} blocks are still used")
    # A client may go before its request was read.
    ended = values["finished"] + values["aborted"] + values["failed"]
    if values["failed"] or ended > num_requests or values["aborted"] == 0:
        raise SystemExit(f"error: of {num_requests} requests, the server counts {values}")


def main() -> None:
    """Print what became of the requests and the memory; exit status 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--disconnects", type=float, default=0.1)
    parser.add_argument("--policy", default="fastserve")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile.json"
        FAST.save(profile)
        command = [
            sys.executable, "-m", "fastserve.cli", "serve", "--backend", "sim", "--profile", str(profile),
            "--policy", arguments.policy, "--port", "0", "--no-page",
        ]  # fmt: skip
        command += [word for setting in SETTINGS for word in ("--set", setting)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            assert server.stderr is not None
            line = server.stderr.readline()
            began = time.monotonic()
            try:
                counts = asyncio.run(soak(line.split()[-1], psutil.Process(server.pid), arguments))
            finally:
                server.send_signal(signal.SIGTERM)
    if server.returncode:
        raise SystemExit(f"error: the server ended with status {server.returncode}")
    early, late = counts.resident_bytes[len(counts.resident_bytes) // 5], counts.resident_bytes[-1]
    print(f"clients: {dict(counts.outcomes)} in {time.monotonic() - began:.0f} s")
    print(f"resident memory: {early / 2**20:.1f} MiB after a fifth, {late / 2**20:.1f} MiB at the end")
    if late > MOST_GROWTH * early:
        raise SystemExit("error: memory has grown")


if __name__ == "__main__":
    main()

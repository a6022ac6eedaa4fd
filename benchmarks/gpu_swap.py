"""Bandwidth of swapping, as a share of what one large page-locked copy reaches in the same run.

Blocks of the model's shape move between a pool on the device and one in host memory, one way, the other, and both at a
time:

* ceiling: one plain copy of all bytes, each way;
* copier: what the engine uses, for transfers of 1 to 64 scattered blocks, and the host's time to start one;
* layer-major: the same bytes as they would lie if every layer had a pool of its own, a key and a value copy a layer;
* beside a load: copies both ways while the device decodes (matrices that are read for a few rows) or multiplies large
  matrices: how much each slows the other down, and how much of the time of the copies is hidden.

Bandwidths are bytes over the time from the first call to the report of the last copy, medians of the repeats; both
ways at a time, they are of the sum of the bytes. The target is a share of 0.85, both ways at a time. On a CPU the
copies are made by threads, and the numbers only show that this runs.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from _gpu import parser, run_benchmark, verdict
from torch import Tensor

from fastserve.core.clock import WallClock
from fastserve.core.config import ModelConfig
from fastserve.core.presets import preset
from fastserve.kvcache import Direction
from fastserve.runtime.worker.copier import BlockCopier, make_copier
from fastserve.runtime.worker.memory import pinned_zeros

TARGET, BLOCK_SIZE = 0.85, 16
NUM_MOVED = 64
"""Blocks a measurement moves each way."""
TRANSFER_SIZES = (1, 4, 16, 64)
NUM_BLOCKS = 160
"""Of either pool. Blocks of the first half leave, those of the second come: no copy changes another's source."""
FIRST_BLOCK = {Direction.OUT: 0, Direction.IN: NUM_BLOCKS // 2}
WAYS = {"out": (Direction.OUT,), "in": (Direction.IN,), "both": (Direction.OUT, Direction.IN)}

Pairs = tuple[list[int], list[int]]


class Swapping:
    """The pools and the measurements on them."""

    def __init__(self, model: ModelConfig, device: torch.device, dtype: str, repeats: int) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.model = model
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.repeats = repeats
        shape = (NUM_BLOCKS, model.num_layers, 2, BLOCK_SIZE, model.num_kv_heads, model.head_dim)
        self.gpu = torch.rand(shape, dtype=self.dtype, device=self.device)
        began = time.perf_counter()
        self.host = (pinned_zeros if self.cuda else torch.zeros)(*shape, dtype=self.dtype)
        self.pinning_s = time.perf_counter() - began
        self.host.copy_(self.gpu)
        self.pools = {Direction.OUT: (self.gpu, self.host), Direction.IN: (self.host, self.gpu)}
        rng = random.Random(0)
        self.scattered: dict[Direction, Pairs] = {}
        for direction, first in FIRST_BLOCK.items():
            blocks = range(first, first + NUM_BLOCKS // 2)
            self.scattered[direction] = (rng.sample(blocks, NUM_MOVED), rng.sample(blocks, NUM_MOVED))
        self.streams = {direction: torch.cuda.Stream(self.device) if self.cuda else None for direction in Direction}
        self.threads = ThreadPoolExecutor(2)
        self.clock = WallClock()
        self.copier: BlockCopier = make_copier(self.gpu, self.host, self.clock)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.gpu[0].nbytes

    def bandwidth(self, num_blocks: int, move: Callable[[], None]) -> float:
        """Bytes per second at which `move` moves so many blocks, after a first time that does not count."""
        seconds = []
        for _ in range(1 + self.repeats):
            self.synchronize()
            began = time.perf_counter()
            move()
            seconds.append(time.perf_counter() - began)
        return num_blocks * self.block_bytes / statistics.median(seconds[1:])

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def plain(self, copy: Callable[[Direction], None], directions: Sequence[Direction]) -> None:
        """Copy, each way on a stream or in a thread of its own, and wait for it."""
        if not self.cuda:
            list(self.threads.map(copy, directions))
            return
        for direction in directions:
            with torch.cuda.stream(self.streams[direction]):
                copy(direction)
        self.synchronize()

    def ceiling(self, directions: Sequence[Direction]) -> float:
        """Bytes per second of one copy each way."""

        def copy(direction: Direction) -> None:
            source, destination = (pool.narrow(0, FIRST_BLOCK[direction], NUM_MOVED) for pool in self.pools[direction])
            destination.copy_(source, non_blocking=True)

        return self.bandwidth(NUM_MOVED * len(directions), lambda: self.plain(copy, directions))

    def layer_major(self, directions: Sequence[Direction], num_blocks: int = 16) -> float:
        """Bytes per second of blocks in a piece for every layer's keys and one for its values, a copy each.

        The pools are read as `[2 * num_layers, num_blocks, rest]`, so that the pieces lie as they would.
        """
        pieces = 2 * self.model.num_layers

        def copy(direction: Direction) -> None:
            source, destination = (pool.view(pieces, NUM_BLOCKS, -1) for pool in self.pools[direction])
            pairs = list(zip(*self.scattered[direction], strict=True))[:num_blocks]
            for layer in range(pieces):
                for origin, target in pairs:
                    destination[layer, target].copy_(source[layer, origin], non_blocking=True)

        return self.bandwidth(num_blocks * len(directions), lambda: self.plain(copy, directions))

    def start_transfers(self, directions: Sequence[Direction], size: int) -> list[float]:
        """Start transfers of `size` blocks that move all; returns the seconds that starting each took."""
        took = []
        for first in range(0, NUM_MOVED, size):
            for direction in directions:
                source, destination = (blocks[first : first + size] for blocks in self.scattered[direction])
                began = time.perf_counter()
                self.copier.start(direction, source, destination, None)
                took.append(time.perf_counter() - began)
        return took

    def finish_transfers(self) -> float:
        """Wait for all; returns the seconds from the start of the first to the end of the last."""
        copies = []
        while self.copier.num_in_flight:
            self.copier.wait(math.inf)
            copies += self.copier.finished()
        return max(copy.end_s for copy in copies) - min(copy.start_s for copy in copies)

    def copier_at(self, size: int, directions: Sequence[Direction]) -> tuple[float, float]:
        """Bytes per second with transfers of so many blocks, and the seconds that starting one takes the host."""
        took: list[float] = []

        def move() -> None:
            took.extend(self.start_transfers(directions, size))
            self.finish_transfers()

        return self.bandwidth(NUM_MOVED * len(directions), move), statistics.median(took)

    def check(self) -> None:
        """Raise RuntimeError unless the blocks last copied are where they should be."""
        for direction, (source, destination) in self.scattered.items():
            source_pool, destination_pool = self.pools[direction]
            for origin, target in zip(source, destination, strict=True):
                if not torch.equal(source_pool[origin].to(self.device), destination_pool[target].to(self.device)):
                    raise RuntimeError(f"block {origin} swapped {direction.value} to {target} did not arrive")

    def beside(self, load: Callable[[], Any], rounds: int = 2, size: int = 16) -> dict[str, float]:
        """Time the load and the copies both ways alone and together, the load long enough to cover them."""

        def copies() -> None:
            for _ in range(rounds):
                self.start_transfers(WAYS["both"], size)

        def copies_alone() -> float:
            copies()
            return self.finish_transfers()

        copying = statistics.median(copies_alone() for _ in range(self.repeats))
        load()
        count = math.ceil(1.5 * copying / max(1e-6, self.started(load, 10)() / 10))
        computing = statistics.median(self.started(load, count)() for _ in range(self.repeats))
        computing_beside, copying_beside, together = [], [], []
        for _ in range(self.repeats):
            self.synchronize()
            began = time.perf_counter()
            wait = self.started(load, count)
            copies()
            computing_beside.append(wait())
            copying_beside.append(self.finish_transfers())
            together.append(time.perf_counter() - began)
        return {
            "load_alone_s": computing,
            "copies_alone_s": copying,
            "together_s": statistics.median(together),
            "load_slowdown": statistics.median(computing_beside) / computing - 1,
            "copies_slowdown": statistics.median(copying_beside) / copying - 1,
            "hidden_share": 1 - (statistics.median(together) - computing) / copying,
        }

    def started(self, load: Callable[[], Any], count: int) -> Callable[[], float]:
        """Start the load `count` times over; returns a function that waits for it and gives the seconds it took."""

        def run() -> float:
            began = time.perf_counter()
            for _ in range(count):
                load()
            return time.perf_counter() - began

        if not self.cuda:
            return self.threads.submit(run).result
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()

        def wait() -> float:
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3

        return wait

    def loads(self) -> dict[str, Callable[[], Tensor]]:
        """What runs beside the copies: bound by the bandwidth of the device's memory, and by its arithmetic."""
        hidden, side = self.model.hidden_size, 8192 if self.cuda else 256
        rows = torch.rand(16, hidden, dtype=self.dtype, device=self.device)
        # More than a cache holds; in one piece, lest so many kernels are queued that the host has to wait.
        weights = torch.rand(hidden, 32 * hidden, dtype=self.dtype, device=self.device)
        square = torch.rand(side, side, dtype=self.dtype, device=self.device)
        return {"decode (16 rows)": lambda: rows @ weights, "large matmul": lambda: square @ square}


def measure(bench: Swapping) -> dict[str, Any]:
    """Everything, printed as it comes."""
    gb = 1e9
    found: dict[str, Any] = {
        "block_bytes": bench.block_bytes,
        "num_blocks_moved": NUM_MOVED,
        "pinning": {"bytes": bench.host.nbytes, "seconds": bench.pinning_s},
    }
    print(
        f"{bench.model.name} {str(bench.dtype).removeprefix('torch.')}: blocks of {bench.block_bytes / 1e6:.3f} MB; "
        f"{bench.host.nbytes / gb:.2f} GB of host memory made ready in {bench.pinning_s:.2f} s\n\n"
        f"{'GB/s (share of the ceiling)':32}" + "".join(f"{way:>16}" for way in WAYS) + f"{'host per start':>18}"
    )
    ceiling = found["ceiling_bytes_per_s"] = {way: bench.ceiling(directions) for way, directions in WAYS.items()}
    print(f"{'one copy':32}" + "".join(f"{rate / gb:9.3f}       " for rate in ceiling.values()))

    def row(name: str, rates: dict[str, float], note: str = "") -> None:
        cells = (f"{rate / gb:9.3f} ({rate / ceiling[way]:4.0%})" for way, rate in rates.items())
        print(f"{name:32}" + "".join(cells) + note)

    found["copier"] = []
    for size in TRANSFER_SIZES:
        both = {way: bench.copier_at(size, directions) for way, directions in WAYS.items()}
        rates, host_s = ({way: pair[i] for way, pair in both.items()} for i in range(2))
        shares = {way: rate / ceiling[way] for way, rate in rates.items()}
        found["copier"].append(
            {"blocks": size, "bytes_per_s": rates, "share_of_ceiling": shares, "host_s_per_start": host_s["both"]}
        )
        row(f"copier, {size} blocks a transfer", rates, f"{host_s['both'] * 1e6:15.1f} µs")
    bench.check()
    pieces = 2 * bench.model.num_layers
    rates = {way: bench.layer_major(directions) for way, directions in WAYS.items()}
    found["layer_major"] = {
        "copies_per_block": pieces,
        "bytes_per_s": rates,
        "share_of_ceiling": {way: rate / ceiling[way] for way, rate in rates.items()},
    }
    row(f"layer-major, {pieces} copies a block", rates)
    found["beside"] = {}
    print(f"\n{'copies both ways beside a load':32}{'load':>16}{'copies':>16}{'hidden':>16}")
    for name, load in bench.loads().items():
        result = found["beside"][name] = bench.beside(load)
        print(
            f"{name:32}{result['load_slowdown']:+16.1%}{result['copies_slowdown']:+16.1%}{result['hidden_share']:16.1%}"
        )
    if bench.cuda:
        least = min(entry["share_of_ceiling"]["both"] for entry in found["copier"])
        found["targets"] = [verdict("both ways at a time, least share of the ceiling", least, TARGET, at_most=False)]
    return found


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, and print the table."""
    device = torch.device(arguments.device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        bench = Swapping(preset(arguments.model), device, arguments.dtype, arguments.repeats)
        found = measure(bench)
        bench.copier.close()
    return found


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=7, help="times each is measured (default: %(default)s)")
    run_benchmark(options, benchmark)

"""Kernel tables by operator, as aiconfigurator 0.8.0 has them: a GPU and an engine's version a folder, in milliseconds.

`systems/data/<gpu>/<engine>/<version>` holds times of matrix products, attention and all-reduces over their sizes;
`systems/data/<gpu>/nccl/<version>` those of collective operations; `systems/<gpu>.yaml` describes the machine. A stage
is put together of them. What they do not hold is estimated, and the profile's provenance says how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

from fastserve.core.config import ModelConfig
from fastserve.core.errors import ConfigError
from fastserve.core.parallel import ParallelConfig, Place
from fastserve.latency.communication import all_reduces
from fastserve.latency.kernel_latency import Line, Rows
from fastserve.latency.kernel_tables import Curve, KernelTables
from fastserve.profiling.kernels.curves import check_unit, curve, line, sum_of, whole_neighbours
from fastserve.profiling.kernels.imported import ImportedKernels
from fastserve.profiling.kernels.rows import Row, read_rows
from fastserve.profiling.kernels.systems import System, read_system
from fastserve.profiling.kernels.work import Product, layer_products, layer_traffic, lm_head, stage_traffic

_UNIT_S, _UNIT = 1e-3, "milliseconds"
_REMEDY = "Give a folder such as aiconfigurator:PATH/systems/data/a100_sxm/vllm/0.14.0 of aiconfigurator 0.8.0"
_DTYPE, _NUMBER = "float16", 2
"""The tables' times in 16 bits, and bytes of such a number."""
_HEAD_DIM = 128
_SAMPLER_BYTES = 10
"""Of a logit: read in 16 bits, written in 32, read for the largest."""

_SLOWER_MEMORY = (
    "{:.3f} x slower than the measured GPU's: a product takes at least its time for one token x this; attention of "
    "decodes above its shortest time x this; attention of prompts and all-reduces as measured"
)

Table = Mapping[int, Mapping[int, float]]
"""Seconds by two numbers."""


def read_aiconfigurator(
    folder: Path,
    model: ModelConfig,
    parallel: ParallelConfig,
    memory_gb: float | None = None,
    memory_bandwidth: float | None = None,
) -> ImportedKernels:
    """Put together the stages of `model` of the tables in `folder`.

    `memory_bandwidth` in bytes/s is of a GPU that differs from the measured one in its memory alone, which is slower:
    a product takes what it took, but at least the reading of its weights (its time for one token, so much longer);
    attention of decodes takes so much longer above its shortest time, and that of prompts as long as before.

    ConfigError for a model that the tables cannot give: with a head size other than 128, shapes below the smallest
    measured, heads or all-reduces that were not measured. A product beyond the largest measured is extrapolated in
    proportion, with a warning.
    """
    measured = system = read_system(_system_file(folder))
    if memory_bandwidth is not None:
        system = replace(measured, memory_bandwidth=memory_bandwidth)
    slowdown = measured.memory_bandwidth / system.memory_bandwidth
    if model.head_dim != _HEAD_DIM:
        raise ConfigError(
            f"model {model.name} has head_dim {model.head_dim}; {folder} holds attention of {_HEAD_DIM} only. Take "
            "tables of this model's layers, or measure it (`fastserve profile` without --kernels)"
        )
    places = [
        parallel.place(stage * parallel.tensor_parallel_size, model) for stage in range(parallel.pipeline_parallel_size)
    ]
    reader = _Reader(folder, system, model, slowdown)
    stages = tuple(reader.stage(place) for place in places)
    num_gpus = parallel.world_size
    return ImportedKernels(
        stages=stages,
        gpu=system.gpu(reader.products.device, memory_gb),
        engine=f"kernels of {reader.products.framework}",
        dtype=_DTYPE,
        stage_link=system.stage_link(num_gpus, model.hidden_size * _NUMBER) if len(places) > 1 else None,
        provenance={
            "source": f"operator tables of aiconfigurator: {reader.products.framework} on {reader.products.device}",
            "method": (
                "matrix products of each linear layer at its shape, linear in n and in k between measured ones; "
                "attention by heads; all-reduces as measured with CUDA graphs; summed over the layers of a stage"
            ),
            "element_wise": (
                "estimated, not measured: norms, activation, rotary embedding, residual, sampler as memory traffic at "
                f"{system.bandwidth_factor:g} of {system.memory_bandwidth / 1e12:g} TB/s, and "
                f"{system.operation_latency_s * 1e6:g} us an operation"
            ),
            **({} if slowdown == 1 else {"memory": _SLOWER_MEMORY.format(slowdown)}),
            "mixed_iterations": "not measured: the attention of prompts and that of decodes add up",
            "chunks": "not measured: priced as whole prompts of as many attended pairs",
            "error": "kernels alone: an engine's own time is not in them",
        },
        warnings=tuple(dict.fromkeys(reader.warnings)),
    )


def _system_file(folder: Path) -> Path:
    """`systems/a100_sxm.yaml` of `systems/data/a100_sxm/vllm/0.14.0`."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder. {_REMEDY}")
    above = folder.resolve().parents
    if len(above) < 4:
        raise ConfigError(f"{folder} does not lie in aiconfigurator's systems folder. {_REMEDY}")
    return above[3] / f"{above[1].name}.yaml"


class _Reader:
    """The tables of one folder, and stages of one model made of them."""

    def __init__(self, folder: Path, system: System, model: ModelConfig, slowdown: float) -> None:
        self._folder, self._system, self._model, self._slowdown = folder, system, model, slowdown
        self.warnings: list[str] = []
        self.products = _Products(folder / "gemm_perf.txt", slowdown, self.warnings)
        self._decode = _read_attention(folder / "generation_attention_perf.txt")
        self._prompts = _read_attention(folder / "context_attention_perf.txt")

    def stage(self, place: Place) -> KernelTables:
        """Kernel times of one shard of a stage."""
        model, system = self._model, self._system
        products = [self.products.line(each) for each in layer_products(model, place)]
        layer_bytes = [_NUMBER * numbers for numbers in layer_traffic(model, place)]
        stage_bytes = [_NUMBER * numbers for numbers in stage_traffic(model, place)]

        def of_layers(tokens: int) -> float:
            return place.num_layers * (
                sum(each.value(tokens) for each in products)
                + sum(system.element_wise_s(tokens * num_bytes) for num_bytes in layer_bytes)
            )

        def once(tokens: int) -> float:
            return sum(system.element_wise_s(tokens * num_bytes) for num_bytes in stage_bytes)

        points = {int(point) for each in products for point in each.points()}
        parts: list[Callable[[int], float]] = [of_layers, once]
        if place.num_shards > 1:
            layers = [place.num_layers] if place.is_first_stage else [0, place.num_layers]
            count = all_reduces(layers)[-1]
            sums = _read_all_reduces(self._folder, system, place.num_shards, max(points) * model.hidden_size)
            parts.append(lambda tokens: count * sums.value(tokens * model.hidden_size))
            points |= whole_neighbours([point / model.hidden_size for point in sums.points()], 1, max(points))
        dense = sum_of(parts, points)
        decode = self._attention(self._decode, place, "decode")
        of_one_token = sum(each.value(1) for each in products) + decode[0][1].seconds[0] / place.num_layers
        check_unit(f"{self._folder}", of_one_token, _UNIT)
        return KernelTables(
            dense=dense,
            per_sequence=self._per_sequence(place) if place.is_last_stage else None,
            decode=decode,
            prompts=self._attention(self._prompts, place, "prompts"),
            prompts_by_length=True,
        )

    def _per_sequence(self, place: Place) -> Curve:
        """LM head, the gathering of the shards' logits, and the sampler."""
        model, system = self._model, self._system
        head = self.products.line(lm_head(model, place))
        points = {int(point) for point in head.points()}
        parts: list[Callable[[int], float]] = [
            head.value,
            lambda sequences: system.element_wise_s(sequences * model.vocab_size * _SAMPLER_BYTES),
        ]
        if place.num_shards > 1:
            gathered = _read_nccl(self._folder, system, "all_gather", place.num_shards)
            parts.append(lambda sequences: gathered.value(sequences * model.vocab_size))
            points |= whole_neighbours([point / model.vocab_size for point in gathered.points()], 1, max(points))
        return sum_of(parts, points)

    def _attention(self, tables: _AttentionTables, place: Place, what: str) -> tuple[tuple[int, Curve], ...]:
        """Attention over all layers, by sequences.

        Heads that were not measured are replaced: B sequences of H KV heads are as much work, cut into as many parts,
        as B x H / g sequences of g KV heads with as many queries each.
        """
        model = self._model
        heads, kv_heads = len(place.heads(model)), len(place.kv_heads(model))
        queries = heads // kv_heads
        fitting = [g for g in range(1, kv_heads + 1) if not kv_heads % g and (g * queries, g) in tables.by_heads]
        if not fitting:
            known = ", ".join(f"{h}/{kv}" for h, kv in sorted(tables.by_heads))
            raise ConfigError(
                f"{tables.path}: no rows for {heads} heads and {kv_heads} KV heads, nor for a part of them with "
                f"{queries} a KV head, as model {model.name} on {place.num_shards} shards needs; measured: {known}"
            )
        measured = fitting[-1]
        table = tables.by_heads[measured * queries, measured]
        copies = kv_heads // measured
        if copies > 1:
            self.warnings.append(
                f"attention of {what}: {heads} heads and {kv_heads} KV heads were not measured; a sequence is priced "
                f"as {copies} of {measured * queries} and {measured} heads, which are the same work"
            )
        if tables is self._decode:
            table = _on_slower_memory(table, self._slowdown)
        return _with_sequences_as(copies, table, place.num_layers)


class _Products:
    """Times of matrix products (m, k) x (k, n) over m, by n and k."""

    def __init__(self, path: Path, slowdown: float, warnings: list[str]) -> None:
        self._path, self._slowdown, self._warnings = path, slowdown, warnings
        self._table: dict[tuple[int, int], dict[int, float]] = {}
        self.device = self.framework = ""
        columns = ("framework", "version", "device", "gemm_dtype", "m", "n", "k", "latency")
        for row in read_rows(path, columns, _REMEDY):
            if row.text("gemm_dtype") != _DTYPE:
                continue
            seconds = self._table.setdefault((row.integer("n", 1), row.integer("k", 1)), {})
            m = row.integer("m", 1)
            if m in seconds:
                row.fail(f"m {m}, n {row.text('n')}, k {row.text('k')} are in the table twice; remove one of the rows")
            seconds[m] = row.seconds("latency", _UNIT_S)
            if not self.device:
                framework = row.text("framework").replace("VLLM", "vLLM")
                self.device, self.framework = row.text("device"), f"{framework} {row.text('version')}"
        if not self._table:
            raise ConfigError(f"{path}: no rows with gemm_dtype {_DTYPE}. {_REMEDY}")
        self._n = sorted({n for n, _ in self._table})
        self._k = sorted({k for _, k in self._table})

    def line(self, of: Product) -> Line:
        """Seconds of a product over the tokens m, linear in n and in k between the measured ones."""
        n, beyond_n = self._within(of, "n", of.n, self._n)
        k, beyond_k = self._within(of, "k", of.k, self._k)
        corners = [(n_at, k_at, n_share * k_share) for (n_at, n_share), (k_at, k_share) in product(n, k)]
        missing = [(n_at, k_at) for n_at, k_at, _ in corners if (n_at, k_at) not in self._table]
        if missing:
            raise ConfigError(
                f"{self._path}: no rows for n {missing[0][0]}, k {missing[0][1]} ({_DTYPE}), next to {of.name} "
                f"with n {of.n}, k {of.k}; use more shards (--tensor-parallel-size)"
            )
        tables = [(self._table[n_at, k_at], share) for n_at, k_at, share in corners]
        first, n_at, k_at = tables[0][0], *corners[0][:2]
        for seconds, _ in tables:
            if other := set(seconds) ^ set(first):
                raise ConfigError(
                    f"{self._path}: n {n_at}, k {k_at} and its neighbours have other m, such as {min(other)}; give "
                    "each shape rows for all"
                )
        factor = beyond_n * beyond_k
        times = {m: factor * sum(share * seconds[m] for seconds, share in tables) for m in first}
        if self._slowdown > 1:
            reading = self._slowdown * times[min(times)]
            times = {m: max(seconds, reading) for m, seconds in times.items()}
        return line(times)

    def _within(self, of: Product, axis: str, size: int, measured: list[int]) -> tuple[list[tuple[int, float]], float]:
        """Measured sizes around `size` with their shares, and a factor for what lies beyond the largest."""
        if size < measured[0]:
            raise ConfigError(
                f"{self._path}: {of.name} has {axis} {size}, the smallest measured is {measured[0]}; use fewer shards"
            )
        largest = measured[-1]
        if size > largest:
            self._warnings.append(
                f"{of.name} has {axis} {size}, {size / largest:.2f} x the largest measured ({largest}): its time is "
                f"that of {largest}, in proportion"
            )
            return [(largest, 1.0)], size / largest
        above = next(each for each in measured if each >= size)
        if above == size:
            return [(size, 1.0)], 1.0
        below = measured[measured.index(above) - 1]
        share = (size - below) / (above - below)
        return [(below, 1 - share), (above, share)], 1.0


class _AttentionTables:
    """Seconds of one layer's attention by sequences and tokens of each, by heads and KV heads."""

    def __init__(self, path: Path, by_heads: Mapping[tuple[int, int], Table]) -> None:
        self.path, self.by_heads = path, by_heads


def _read_attention(path: Path) -> _AttentionTables:
    """Tokens of a sequence are `isl` + `step`: of a decode, its context with the new token.

    Where heads and KV heads are as many, the tables hold most points twice; the mean is taken.
    """
    columns = ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "beam_width", "attn_dtype")
    found: dict[tuple[int, int], dict[int, dict[int, list[float]]]] = {}
    for row in read_rows(path, (*columns, "kv_cache_dtype", "step", "latency"), _REMEDY):
        if (row.text("attn_dtype"), row.text("kv_cache_dtype"), row.integer("head_dim")) != (_DTYPE, _DTYPE, _HEAD_DIM):
            continue
        heads, kv_heads = row.integer("num_heads", 1), row.integer("num_key_value_heads", 1)
        if heads % kv_heads:
            row.fail(f"{heads} heads do not divide into {kv_heads} KV heads; remove the row")
        tokens = row.integer("isl", 1) + row.integer("step")
        by_tokens = found.setdefault((heads, kv_heads), {}).setdefault(row.integer("batch_size", 1), {})
        by_tokens.setdefault(tokens, []).append(row.seconds("latency", _UNIT_S))
    if not found:
        raise ConfigError(
            f"{path}: no rows with attn_dtype and kv_cache_dtype {_DTYPE}, head_dim {_HEAD_DIM}. {_REMEDY}"
        )
    return _AttentionTables(
        path,
        {
            heads: {
                batch: {tokens: sum(times) / len(times) for tokens, times in by_tokens.items()}
                for batch, by_tokens in by_batch.items()
            }
            for heads, by_batch in found.items()
        },
    )


def _on_slower_memory(table: Table, slowdown: float) -> Table:
    """Decode attention, which reads the cache: what it takes above its shortest time is traffic."""
    shortest = min(min(by_tokens.values()) for by_tokens in table.values())
    return {
        batch: {tokens: shortest + slowdown * (seconds - shortest) for tokens, seconds in by_tokens.items()}
        for batch, by_tokens in table.items()
    }


def _with_sequences_as(copies: int, table: Table, num_layers: int) -> tuple[tuple[int, Curve], ...]:
    """Rows by sequences, of which each is as `copies` sequences of the table, in seconds of so many layers."""
    rows = Rows([(batch, curve(table[batch])) for batch in sorted(table)])
    batches = [batch / copies for batch in table]
    result = []
    for batch in sorted(whole_neighbours(batches, 1, max(batches))):
        found = rows.row(batch * copies)
        result.append((batch, curve({int(at): num_layers * found.value(at) for at in found.points()})))
    return tuple(result)


def _read_all_reduces(folder: Path, system: System, num_gpus: int, largest: int) -> Line:
    """Seconds of an all-reduce over the numbers summed, up to `largest`.

    The engine's own with CUDA graphs, and NCCL's for messages or numbers of GPUs that it was not measured for.
    """
    path = folder / "custom_allreduce_perf.txt"
    own: dict[int, float] = {}
    for row in read_rows(path, ("allreduce_dtype", "num_gpus", "message_size", "latency", "backend"), _REMEDY):
        if row.text("allreduce_dtype") != _DTYPE or "graph" not in row.text("backend"):
            continue
        if row.integer("num_gpus", 1) == num_gpus:
            _add(row, own)
    reached = max(own, default=0)
    if reached >= largest:
        return line(own)
    nccl = _nccl_points(folder, system, "all_reduce", num_gpus)
    return line(own | {size: seconds for size, seconds in nccl.items() if size > reached})


def _read_nccl(folder: Path, system: System, operation: str, num_gpus: int) -> Line:
    """Seconds of a collective operation of NCCL over the numbers that every GPU has at its end."""
    return line(_nccl_points(folder, system, operation, num_gpus))


def _nccl_points(folder: Path, system: System, operation: str, num_gpus: int) -> dict[int, float]:
    path = folder.resolve().parents[1] / "nccl" / system.nccl_version / "nccl_perf.txt"
    points: dict[int, float] = {}
    known: set[int] = set()
    for row in read_rows(path, ("op_name", "nccl_dtype", "num_gpus", "message_size", "latency"), _REMEDY):
        if (row.text("op_name"), row.text("nccl_dtype")) == (operation, "half"):
            known.add(row.integer("num_gpus", 1))
            if row.integer("num_gpus") == num_gpus:
                _add(row, points)
    if not points:
        raise ConfigError(
            f"{path}: no {operation} of {num_gpus} GPUs; use a tensor_parallel_size among "
            f"{', '.join(map(str, sorted(known))) or 'none'}"
        )
    return points


def _add(row: Row, points: dict[int, float]) -> None:
    """`message_size` counts numbers of 16 bits, not bytes: halves of twice the bytes take as long as NCCL's int8."""
    size = row.integer("message_size", 1)
    if size in points:
        row.fail(f"message_size {size} is in the table twice; remove one of the rows")
    points[size] = row.seconds("latency", _UNIT_S)

"""A model on several ranks computes what it does on one: real processes, gloo, real checkpoints."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed import FileStore

from fastserve.core.config import CacheConfig, ModelConfig
from fastserve.core.errors import ConfigError
from fastserve.core.parallel import ParallelConfig, Place
from fastserve.core.presets import preset
from fastserve.core.request import SamplingParams
from fastserve.runtime.models import SequenceInput, load_config
from fastserve.runtime.parallel.groups import Ranks, join, leave
from fastserve.runtime.worker import Worker
from fastserve.runtime.worker.sampler import SharedVocabulary, sample
from support.devices import NEEDS_INTERPRETER
from support.rank_processes import TIMEOUT_S, RankProcesses

BLOCK, BLOCKS_EACH = 8, 8
PROMPT_LENS, CHUNK, OUTPUT = (1, 3, 8, 21, 40), 15, 8
SAMPLING = [
    SamplingParams(),
    SamplingParams(temperature=0.9, seed=5),
    SamplingParams(),
    SamplingParams(),
    SamplingParams(temperature=1.3, top_p=0.9, top_k=50, seed=6),
]
FAMILIES = ["opt", "llama-gqa", "llama-tied"]
CPU = torch.device("cpu")


class Step(NamedTuple):
    """An iteration, and what it must give."""

    sequences: list[SequenceInput]
    sampling: list[SamplingParams]
    tokens: list[int]
    logits: Tensor


@dataclass
class Reference:
    """What a single rank does with the model in a directory."""

    directory: Path
    steps: list[Step]
    cache: Tensor


def save(family: str, directory: Path) -> None:
    """A model of fixed seed whose biases and norms do something: a bias added twice must show."""
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    torch.manual_seed(1)
    common: dict[str, Any] = {
        "vocab_size": 211,  # No multiple of the shards.
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 96,
    }
    if family == "opt":
        model = OPTForCausalLM(OPTConfig(**common, word_embed_proj_dim=32, ffn_dim=80, init_std=0.3))
    else:
        llama = {"num_key_value_heads": 2, "intermediate_size": 72, "initializer_range": 0.3}
        tied = family == "llama-tied"
        model = LlamaForCausalLM(LlamaConfig(**common, **llama, tie_word_embeddings=tied, head_dim=16 if tied else 8))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory, max_shard_size="40KB")


def recorded(worker: Worker) -> list[Tensor]:
    """The list to which the worker's model will add what it computes."""
    results: list[Tensor] = []
    worker.model.register_forward_hook(lambda _module, _inputs, result: results.append(result.clone()))
    return results


def make_reference(directory: Path) -> Reference:
    """Prompts, one of them in chunks and among decodes, then decode batches of changing order."""
    worker = Worker(load_config(directory), num_gpu_blocks=64, num_host_blocks=0, block_size=BLOCK, model_dir=directory)
    results = recorded(worker)
    tokens = [list(range(5 + i, 5 + i + n)) for i, n in enumerate(PROMPT_LENS)]
    tables = [list(range(i * BLOCKS_EACH, (i + 1) * BLOCKS_EACH)) for i in range(len(tokens))]
    computed = [0] * len(tokens)
    schedule = [[(0, 1), (1, 3), (2, 8)], [(3, 21), (0, 1), (4, CHUNK)], [(4, 25), (2, 1), (1, 1), (0, 1), (3, 1)]]
    schedule += [[(i, 1) for i in members] for members in ((3, 1, 4), (0,), (4, 2), *[(0, 1, 2, 3, 4)] * OUTPUT)]
    steps = []
    for members in schedule:
        sequences = [
            SequenceInput(tokens[i][computed[i] : computed[i] + n], computed[i], tables[i]) for i, n in members
        ]
        sampling = [SAMPLING[i] for i, _ in members]
        given = worker.execute(sequences, sampling)
        steps.append(Step(sequences, sampling, given, results.pop()))
        for (i, n), token in zip(members, given, strict=True):
            computed[i] += n
            if computed[i] == len(tokens[i]):
                tokens[i].append(token)
    assert len({token for step in steps for token in step.tokens}) > 20  # a model that repeats itself proves nothing
    return Reference(directory, steps, worker.gpu_cache.clone())


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    directories = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, directory in directories.items():
        save(family, directory)
    return {family: make_reference(directory) for family, directory in directories.items()}


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankProcesses]:
    ranks = RankProcesses(4, tmp_path_factory.mktemp("stores"))
    yield ranks
    ranks.close()


class Held(NamedTuple):
    """What a rank has at the end."""

    place: Place
    tokens: list[list[int]]
    results: list[Tensor]
    cache: Tensor
    progress: tuple[int, str]


def meet(rank: int, store: FileStore, model: ModelConfig, parallel: ParallelConfig) -> tuple[Place, Ranks]:
    place = parallel.place(rank, model)
    return place, join(place, parallel.world_size, CPU, store, TIMEOUT_S)


def part_ways() -> None:
    """When all have come so far: what one has sent is lost when it leaves."""
    torch.distributed.barrier()
    leave()


def run_steps(
    rank: int, store: FileStore, directory: Path, parallel: ParallelConfig, steps: list[Step], options: dict[str, Any]
) -> Held:
    """Run the iterations on one of the ranks."""
    model = load_config(directory)
    place, ranks = meet(rank, store, model, parallel)
    worker = Worker(
        model,
        num_gpu_blocks=64,
        num_host_blocks=0,
        block_size=BLOCK,
        model_dir=directory,
        place=place,
        ranks=ranks,
        **options,
    )
    worker.gpu_cache[: len(PROMPT_LENS) * BLOCKS_EACH] = torch.nan
    results = recorded(worker)
    tokens = []
    for step in steps:
        worker.prepare(step.sequences)
        tokens.append(worker.execute(step.sequences, step.sampling))
    part_ways()
    return Held(place, tokens, results, worker.gpu_cache, (ranks.progress.count, ranks.progress.waiting_for))


def check(held: list[Held], reference: Reference, num_steps: int | None = None) -> None:
    """The tokens, the logits, and every rank's part of the cache, are the single rank's."""
    model, steps = load_config(reference.directory), reference.steps[:num_steps]
    for place, tokens, _, cache, progress in held:
        assert tokens == [step.tokens if place.is_last_stage else [] for step in steps]
        assert progress[0] > 0
        assert progress[1] == ""
        layers = slice(place.first_layer, place.first_layer + place.num_layers)
        own = reference.cache[:, layers, :, :, list(place.kv_heads(model))]
        if num_steps is None:
            torch.testing.assert_close(cache.nan_to_num(0.0), own, rtol=1e-4, atol=1e-5)
        else:
            assert cache.shape == own.shape
    for index, step in enumerate(steps):
        logits = torch.cat([one.results[index] for one in held if one.place.is_last_stage], 1)
        torch.testing.assert_close(logits[: len(step.tokens)], step.logits, rtol=1e-4, atol=1e-4)


SHAPES = {
    "two stages": ParallelConfig(1, 2),
    "two shards": ParallelConfig(2, 1),
    "two of each": ParallelConfig(2, 2),
    "more shards than KV heads": ParallelConfig(4, 1),
    "uneven stages": ParallelConfig(1, 3, (1, 2, 1)),
    "a stage of most layers": ParallelConfig(2, 2, (3, 1)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_compute_what_one_does(
    processes: RankProcesses, references: dict[str, Reference], family: str, shape: str
) -> None:
    reference, parallel = references[family], SHAPES[shape]
    held = processes.run(run_steps, parallel.world_size, reference.directory, parallel, reference.steps, {})
    check(held, reference)


def run_interpreted(*args: Any) -> Held:
    os.environ["FASTSERVE_KERNELS"] = "triton"
    try:
        return run_steps(*args)
    finally:
        del os.environ["FASTSERVE_KERNELS"]


@NEEDS_INTERPRETER
def test_decode_batches_in_place(processes: RankProcesses, references: dict[str, Reference]) -> None:
    """On stages and shards alike: their inputs, what they receive and what they send are always in the same place."""
    reference, parallel, num_steps = references["opt"], SHAPES["two of each"], 7
    options = {"max_batch_size": 3, "max_model_len": 64}
    steps = reference.steps[:num_steps]
    assert sum(all(len(one.token_ids) == 1 for one in step.sequences) and len(step.tokens) < 4 for step in steps) == 3
    held = processes.run(run_interpreted, parallel.world_size, reference.directory, parallel, steps, options)
    check(held, reference, num_steps)


def run_in_bfloat16(rank: int, store: FileStore, parallel: ParallelConfig, directory: Path) -> list[int]:
    model = load_config(directory)
    place, ranks = meet(rank, store, model, parallel)
    worker = Worker(
        model, num_gpu_blocks=8, num_host_blocks=8, block_size=BLOCK, dtype="bfloat16", place=place, ranks=ranks
    )
    tokens = worker.execute([SequenceInput([5, 6, 7], 0, [0])], [SamplingParams()])
    cache = CacheConfig(num_gpu_blocks=8, num_host_blocks=8, block_size=BLOCK)
    worker.require(model, cache, "cpu", "bfloat16")
    with pytest.raises(ConfigError, match="num_gpu_blocks=9: the worker given has 8"):
        worker.require(model, replace(cache, num_gpu_blocks=9), "cpu", "bfloat16")
    part_ways()
    return tokens


def test_half_precision_and_dummy_weights(processes: RankProcesses, references: dict[str, Reference]) -> None:
    directory, parallel = references["llama-gqa"].directory, SHAPES["two of each"]
    tokens = processes.run(run_in_bfloat16, parallel.world_size, parallel, directory)
    worker = Worker(load_config(directory), num_gpu_blocks=8, num_host_blocks=0, block_size=BLOCK, dtype="bfloat16")
    single = worker.execute([SequenceInput([5, 6, 7], 0, [0])], [SamplingParams()])
    assert tokens == [[], [], single, single]


def exchange(rank: int, store: FileStore, parallel: ParallelConfig, model: ModelConfig) -> None:
    _, ranks = meet(rank, store, model, parallel)
    group = ranks.group
    assert (group.index, group.size) == (rank, 4)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64):
        x = torch.arange(6).view(2, 3).to(dtype)
        assert torch.equal(group.all_gather(x * rank), torch.stack([x * i for i in range(4)]))
        strided = (x * rank)[:, :2]
        assert torch.equal(group.all_gather(strided), torch.stack([x[:, :2] * i for i in range(4)]))
        assert torch.equal(group.all_reduce(strided), x[:, :2] * 6)
    part_ways()


def test_a_group_sums_and_gathers_any_type(processes: RankProcesses, references: dict[str, Reference]) -> None:
    parallel = ParallelConfig(4, 1)
    processes.run(exchange, 4, parallel, load_config(references["opt"].directory))


def draw(
    rank: int, store: FileStore, parallel: ParallelConfig, model: ModelConfig, logits: Tensor, params: list[Any]
) -> list[int]:
    place, ranks = meet(rank, store, model, parallel)
    shared = SharedVocabulary.of(model, place, ranks.group)
    assert shared is not None
    held = place.vocabulary(model)
    own = logits[:, held.start : held.stop]
    assert torch.equal(shared.whole(own), logits)
    tokens = sample(own, params, range(len(params)), shared).tolist()
    part_ways()
    return tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_sample_alike(processes: RankProcesses, references: dict[str, Reference], dtype: torch.dtype) -> None:
    """What a single rank would, of equally likely tokens the first; and without a seed all the same."""
    model = load_config(references["opt"].directory)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, model.vocab_size, generator=generator).to(dtype)
    logits[:10] = logits[:10].round()  # Ties, of which many lie in several shards.
    logits[10] = -7.0
    logits[11, [52, 53, 105, 106, 210]] = 9.0
    params = [SamplingParams(temperature=0.8 if i >= 20 else 0.0, seed=i if i < 30 else None) for i in range(40)]
    tokens = processes.run(draw, 4, ParallelConfig(4, 1), model, logits, params)
    assert all(shard == tokens[0] for shard in tokens)
    assert tokens[0][:30] == sample(logits, params, range(40)).tolist()[:30]
    assert tokens[0][10:12] == [0, 52]


def send_ahead(rank: int, store: FileStore, parallel: ParallelConfig, model: ModelConfig) -> list[str]:
    """Rank 0 sends before rank 1 is ready to receive, and rank 2 waits for rank 1, which can be seen."""
    _, ranks = meet(rank, store, model, parallel)
    neighbours = ranks.neighbours
    seen: list[str] = []
    assert neighbours is not None
    x = torch.empty(300, model.hidden_size)  # Larger than what fits in flight unasked.
    if rank == 0:
        for value in (1.0, 2.0, 3.0):
            neighbours.send(torch.full_like(x, value))
        store.set("sent", "yes")
        neighbours.send(torch.full_like(x, 4.0))
    elif rank == 1:
        store.wait(["sent"])
        for value in (1.0, 2.0, 3.0, 4.0):
            neighbours.receive(x)
            assert torch.equal(x, torch.full_like(x, value))
        store.wait(["seen"])  # Not before rank 2 is seen to wait.
        neighbours.send(x[:1])
    else:

        def watch() -> None:
            deadline = time.monotonic() + TIMEOUT_S
            while "stage 1" not in seen and time.monotonic() < deadline:
                seen.append(ranks.progress.waiting_for)
                time.sleep(0.001)
            store.set("seen", "yes")

        before = ranks.progress.count
        thread = threading.Thread(target=watch)
        thread.start()
        neighbours.receive(x[:1])
        thread.join(TIMEOUT_S)
        assert ranks.progress.count == before + 2
        assert x[0, 0] == 4.0
    part_ways()
    return seen


def test_a_stage_sends_without_waiting(processes: RankProcesses, references: dict[str, Reference]) -> None:
    parallel, model = ParallelConfig(1, 3), load_config(references["opt"].directory)
    *_, seen = processes.run(send_ahead, 3, parallel, model)
    assert seen[-1] == "stage 1"


def wait_in_vain(rank: int, store: FileStore, parallel: ParallelConfig, model: ModelConfig, kind: str) -> str:
    place = parallel.place(rank, model)
    ranks = join(place, parallel.world_size, CPU, store, 1.0)
    try:
        if rank == 1 and kind == "receive":
            assert ranks.neighbours is not None
            ranks.neighbours.receive(torch.empty(1, model.hidden_size))
        elif rank == 1:
            ranks.group.all_reduce(torch.ones(1))
        else:
            store.wait(["given up"])
    except RuntimeError as error:
        return str(error)
    finally:
        store.set("given up", "yes")
        leave()
    return ""


@pytest.mark.parametrize("kind", ["receive", "all_reduce"])
def test_a_wait_has_an_end(processes: RankProcesses, references: dict[str, Reference], kind: str) -> None:
    parallel = ParallelConfig(1, 2) if kind == "receive" else ParallelConfig(2, 1)
    began = time.monotonic()
    silent, message = processes.run(wait_in_vain, 2, parallel, load_config(references["opt"].directory), kind)
    assert silent == ""
    assert "imed out" in message
    assert time.monotonic() - began < TIMEOUT_S


def test_a_single_rank_needs_no_process_group() -> None:
    model = preset("opt-tiny")
    ranks = join(Place.whole(model), 1, CPU, None, 1.0)
    assert (ranks.group.size, ranks.neighbours) == (1, None)
    assert not torch.distributed.is_initialized()
    leave()
    with pytest.raises(ValueError, match="stage 0 of 1, shard 0 of 2 is not one of 3 ranks"):
        join(replace(Place.whole(model), num_shards=2), 3, CPU, None, 1.0)

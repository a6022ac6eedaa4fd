"""The weights of a part of a model are slices of the whole's, and no more than those are read or kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from fastserve.core.config import EngineOptions, ModelConfig
from fastserve.core.errors import CheckpointError, ConfigError
from fastserve.core.parallel import ParallelConfig, Place
from fastserve.core.presets import preset
from fastserve.runtime.models import DecoderModel, Part, empty_model, loader
from fastserve.runtime.models.linear_tuning import tune_linears
from fastserve.runtime.parallel.groups import ALONE
from fastserve.runtime.worker import Worker, sizing
from fastserve.runtime.worker.sizing import default_num_blocks, default_num_host_blocks, rank_bytes
from support.devices import NEEDS_INTERPRETER

CPU = torch.device("cpu")
MODELS = {
    "opt": replace(preset("opt-tiny"), vocab_size=211, num_layers=3),
    "opt-untied": replace(preset("opt-tiny"), vocab_size=211, num_layers=3, tie_word_embeddings=False),
    "llama": replace(preset("llama-tiny"), vocab_size=211, num_layers=3),
    "llama-tied": replace(preset("llama-tiny"), vocab_size=211, num_layers=3, tie_word_embeddings=True),
}
SHAPES = [ParallelConfig(1, 1), ParallelConfig(2, 1), ParallelConfig(4, 1), ParallelConfig(1, 3), ParallelConfig(2, 2)]
PLACED = [
    pytest.param(model, shape.place(rank, model), id=f"{name}-{shape.place(rank, model)}")
    for name, model in MODELS.items()
    for shape in SHAPES
    for rank in range(shape.world_size)
]


def part_of(model: ModelConfig, place: Place, dtype: torch.dtype = torch.float32) -> DecoderModel:
    return empty_model(Part(model, place, ALONE, dtype, CPU))


def dummy(model: ModelConfig, place: Place, dtype: torch.dtype = torch.float32) -> DecoderModel:
    made = part_of(model, place, dtype)
    loader.dummy_weights(made, 3)
    return made


def assert_slices(part: DecoderModel, whole: dict[str, torch.Tensor]) -> None:
    for weight in part.weights():
        expected = whole[weight.name] if weight.is_whole else whole[weight.name][weight.index]
        assert weight.shape == list(whole[weight.name].shape)
        assert torch.equal(weight.target, expected), weight.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model", "place"), PLACED)
def test_dummy_weights_are_those_of_the_whole(model: ModelConfig, place: Place, dtype: torch.dtype) -> None:
    whole = {weight.name: weight.target for weight in dummy(model, Place.whole(model), dtype).weights()}
    assert_slices(dummy(model, place, dtype), whole)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_the_parts_make_up_the_whole(model: ModelConfig, shape: ParallelConfig) -> None:
    """Each element of each tensor is somewhere, and those of biases after a sum in one shard of their stage alone."""
    whole = {weight.name: weight.target for weight in dummy(model, Place.whole(model)).weights()}
    held = {name: torch.zeros_like(tensor, dtype=torch.int64) for name, tensor in whole.items()}
    for rank in range(shape.world_size):
        for weight in part_of(model, shape.place(rank, model)).weights():
            held[weight.name][... if weight.is_whole else weight.index] += 1
    shards = shape.tensor_parallel_size
    for name, times in held.items():
        if "norm" in name or "positions" in name:
            expected = shards
        elif ".k_proj." in name or ".v_proj." in name:
            expected = max(1, shards // model.num_kv_heads)
        else:
            copied = "embed_tokens" in name and model.tie_word_embeddings and shape.pipeline_parallel_size > 1
            expected = 2 if copied else 1
        assert torch.equal(times, torch.full_like(times, expected)), name


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    saved = {}
    for name, model in MODELS.items():
        generator = torch.Generator().manual_seed(0)
        tensors = {
            weight.name: torch.randn(weight.shape, generator=generator)
            for weight in part_of(model, Place.whole(model)).weights()
        }
        directory = tmp_path_factory.mktemp(name)
        save_file(tensors, directory / "model.safetensors")
        saved[repr(model)] = directory, tensors
    return saved


class CountedFile:
    """An open safetensors file that notes how many elements were taken out of it."""

    def __init__(self, file: Any, taken: list[int]) -> None:
        self._file, self._taken = file, taken

    def __enter__(self) -> CountedFile:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def keys(self) -> Sequence[str]:
        return self._file.keys()

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._noted(self._file.get_tensor(name))

    def get_slice(self, name: str) -> CountedSlice:
        return CountedSlice(self._file.get_slice(name), self._noted)

    def _noted(self, tensor: torch.Tensor) -> torch.Tensor:
        self._taken.append(tensor.numel())
        return tensor


class CountedSlice:
    def __init__(self, stored: Any, noted: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._stored, self._noted = stored, noted

    def get_shape(self) -> list[int]:
        return self._stored.get_shape()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._noted(self._stored[index])


@pytest.mark.parametrize(("model", "place"), PLACED)
def test_only_the_slices_are_read(
    monkeypatch: pytest.MonkeyPatch, checkpoints: dict[str, Any], model: ModelConfig, place: Place
) -> None:
    directory, tensors = checkpoints[repr(model)]
    taken: list[int] = []
    opened = loader.safe_open
    monkeypatch.setattr(loader, "safe_open", lambda *args, **options: CountedFile(opened(*args, **options), taken))
    part = part_of(model, place)
    loader.load_weights(part, directory)
    assert_slices(part, tensors)
    assert taken == [weight.target.numel() for weight in part.weights()]


def test_a_slice_of_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = MODELS["opt"]
    tensors = {w.name: torch.zeros(w.shape) for w in part_of(model, Place.whole(model)).weights()}
    name = "model.decoder.layers.0.fc2.weight"
    tensors[name] = torch.zeros(model.hidden_size, model.intermediate_size + 1)
    save_file(tensors, tmp_path / "model.safetensors")
    asked = rf"but config\.json asks for \[{model.hidden_size}, {model.intermediate_size}\]"
    with pytest.raises(CheckpointError, match=asked):
        loader.load_weights(part_of(model, ParallelConfig(2, 1).place(0, model)), tmp_path)


class Allocations(TorchDispatchMode):
    """The most bytes of tensors made within that were alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::empty", "aten::new_empty", "aten::randn", "aten::clone", "aten::zeros"):
            key = id(result)
            self.alive[key] = result.nbytes
            weakref.finalize(result, self.alive.pop, key)
            self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_rank_makes_one_whole_tensor_at_a_time(name: str) -> None:
    model = MODELS[name]
    part = part_of(model, ParallelConfig(2, 1).place(1, model))
    with Allocations() as allocations:
        loader.dummy_weights(part, 0)
    largest = max(4 * torch.Size(weight.shape).numel() for weight in part.weights())
    assert 0 < allocations.peak <= largest


@pytest.mark.parametrize(("model", "place"), PLACED)
def test_bytes_of_a_rank_are_exact(model: ModelConfig, place: Place) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        buffers = {id(buffer): buffer.nbytes for buffer in part_of(model, place, dtype).buffers()}
        assert rank_bytes(model, place, str(dtype).removeprefix("torch.")) == sum(buffers.values())


@pytest.mark.parametrize("name", ["opt-13b", "opt-175b", "llama-3-8b"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_large_model_is_divided_evenly(name: str, shape: ParallelConfig) -> None:
    model = preset(name)
    sizes = [rank_bytes(model, shape.place(rank, model), "float16") for rank in range(shape.world_size)]
    copies = (
        model.vocab_size * model.hidden_size if shape.pipeline_parallel_size > 1 and model.tie_word_embeddings else 0
    )
    assert sum(sizes) == pytest.approx(2 * (model.num_parameters() + copies), rel=0.01)
    # Stages are of equal weight in what an iteration reads: the first holds an embedding besides.
    assert max(sizes) < 1.25 * sum(sizes) / len(sizes)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free bytes of each kind of device."""
    free = {"cpu": 200 * 10**9, "cuda": 80 * 10**9}
    monkeypatch.setattr(sizing, "available_bytes", lambda device: free[device.type])


@pytest.mark.usefixtures("memory")
def test_pools_are_those_of_the_whole_model_without_a_place() -> None:
    model, options = preset("opt-13b"), EngineOptions(max_batch_size=10_000)
    blocks = default_num_blocks(model, options, "cpu", "float16")
    weights = rank_bytes(model, Place.whole(model), "float16")
    assert blocks == int((200e9 - weights) / 16 / (16 * 819_200))
    assert default_num_host_blocks(model, blocks, 16, "cpu", "float16") == blocks
    blocks = default_num_blocks(model, options, "cuda:0", "float16")
    assert blocks == pytest.approx(0.85 * (80e9 - 2 * model.num_parameters()) / (16 * 819_200), rel=1e-3)
    assert default_num_host_blocks(model, blocks, 16, "cuda:0", "float16") == min(
        blocks, int(0.5 * 200e9 / (16 * 819_200))
    )


@pytest.mark.usefixtures("memory")
def test_pools_of_a_part() -> None:
    """A rank's blocks are smaller, and it shares the host's memory, but no GPU."""
    model, options = preset("opt-13b"), EngineOptions(max_batch_size=10_000)
    place = ParallelConfig(4, 2).place(0, model)
    weights = rank_bytes(model, place, "float16")
    cpu_blocks = default_num_blocks(model, options, "cpu", "float16", place, 8)
    assert cpu_blocks == int((200e9 / 8 - weights) / 16 / (2 * 819_200))
    blocks = default_num_blocks(model, options, "cuda:0", "float16", place, 8)
    assert blocks == int(0.85 * (80e9 - rank_bytes(model, place, "float16")) / (2 * 819_200))
    host = default_num_host_blocks(model, blocks, 16, "cuda:0", "float16", place, 8)
    assert host == min(blocks, int(0.5 * 200e9 / (2 * 819_200) / 8))
    few = EngineOptions(max_batch_size=2, max_model_len=100)
    assert default_num_blocks(model, few, "cuda:0", "float16", place, 8) == 14


def test_a_rank_without_room_says_which() -> None:
    model = preset("opt-tiny")
    place = ParallelConfig(1, 2).place(1, model)
    with pytest.raises(
        ConfigError, match=r"model opt-tiny, stage 1 of 2, shard 0 of 1, in float32 with 1000000000 GPU"
    ):
        Worker(model, num_gpu_blocks=10**9, num_host_blocks=0, block_size=16, place=place)


class CountingGroup:
    """The shards of a stage, of which only this one is there."""

    index, size = 1, 2

    def __init__(self) -> None:
        self.num_calls = 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@NEEDS_INTERPRETER
def test_linear_layers_are_timed_without_their_sums() -> None:
    """Else a shard's choices would hang on the others', which may measure something else at the time."""
    model, group = replace(MODELS["opt"], num_layers=1), CountingGroup()
    place = ParallelConfig(2, 1).place(1, model)
    part = empty_model(Part(model, place, group, torch.bfloat16, CPU))
    loader.dummy_weights(part, 0)
    choices = tune_linears(part, [2])
    assert group.num_calls == 0
    hidden, inner = model.hidden_size, model.intermediate_size // 2
    assert {(choice.num_columns, choice.num_inner) for choice in choices} >= {(inner, hidden), (hidden, inner)}
    layer = part.layers[0]
    layer.down(torch.ones(2, inner, dtype=torch.bfloat16))
    assert group.num_calls == 1
    layer.up(torch.ones(2, hidden, dtype=torch.bfloat16))
    assert group.num_calls == 1


@pytest.mark.parametrize(("free_gb", "blocks"), [(100, 2048), (10, 503), (2, 128), (1, 84), (0.3, 1)])
def test_pools_on_a_cpu_are_what_it_has_to_spare(monkeypatch: pytest.MonkeyPatch, free_gb: float, blocks: int) -> None:
    """A full batch of full contexts, or a share of the memory, or one full context if memory is short."""
    model, options = preset("opt-125m"), EngineOptions()
    monkeypatch.setattr(sizing, "available_bytes", lambda device: int(free_gb * 1e9))
    assert default_num_blocks(model, options, "cpu", "float32") == blocks

"""Every layer, head, unit and token of a model is held by the ranks it should be, and no other."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.core.config import ModelConfig
from fastserve.core.errors import ConfigError
from fastserve.core.parallel import ParallelConfig, Place, balanced_stages, tensor_parallel_sizes
from fastserve.core.presets import PRESETS, preset


@st.composite
def layouts(draw: st.DrawFn) -> tuple[ModelConfig, ParallelConfig]:
    """A model, and a shape that it can be divided into."""
    kv_heads, group = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    model = replace(
        preset("llama-tiny"),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * group,
        intermediate_size=12 * draw(st.integers(1, 8)),
        vocab_size=draw(st.integers(30, 300)),
        num_layers=draw(st.integers(1, 12)),
    )
    shards = draw(st.sampled_from(tensor_parallel_sizes(model)))
    if draw(st.booleans()):
        return model, ParallelConfig(shards, draw(st.integers(1, model.num_layers)))
    stages = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    return replace(model, num_layers=sum(stages)), ParallelConfig(shards, len(stages), tuple(stages))


def places_of(model: ModelConfig, parallel: ParallelConfig) -> list[Place]:
    return [parallel.place(rank, model) for rank in range(parallel.world_size)]


@settings(max_examples=200)
@given(layouts())
def test_everything_is_held_once(drawn: tuple[ModelConfig, ParallelConfig]) -> None:
    model, parallel = drawn
    places = places_of(model, parallel)
    assert [place.rank for place in places] == list(range(parallel.world_size))
    assert all(place.is_first_stage == (place.stage == 0) for place in places)
    assert [place.is_last_stage for place in places].count(True) == parallel.tensor_parallel_size

    held = Counter(
        (layer, head)
        for place in places
        for layer in range(place.first_layer, place.first_layer + place.num_layers)
        for head in place.heads(model)
    )
    assert held == Counter((layer, head) for layer in range(model.num_layers) for head in range(model.num_heads))
    for stage in range(parallel.pipeline_parallel_size):
        shards = [place for place in places if place.stage == stage]
        assert [unit for place in shards for unit in place.inner(model)] == list(range(model.intermediate_size))
        assert [token for place in shards for token in place.vocabulary(model)] == list(range(model.vocab_size))
        sizes = [len(place.vocabulary(model)) for place in shards]
        assert max(sizes) - min(sizes) <= 1


@settings(max_examples=200)
@given(layouts())
def test_a_shard_holds_the_kv_heads_that_its_heads_read(drawn: tuple[ModelConfig, ParallelConfig]) -> None:
    model, parallel = drawn
    group = model.num_heads // model.num_kv_heads
    for place in places_of(model, parallel):
        heads, kv_heads = place.heads(model), place.kv_heads(model)
        assert {head // group for head in heads} == set(kv_heads)
        # The kernels take each KV head to be read by as many neighbouring heads as any other.
        local = len(heads) // len(kv_heads)
        assert [kv_heads[i // local] for i in range(len(heads))] == [head // group for head in heads]


@settings(max_examples=200)
@given(layouts())
def test_ranks_share_the_cache(drawn: tuple[ModelConfig, ParallelConfig]) -> None:
    model, parallel = drawn
    copies = max(1, parallel.tensor_parallel_size // model.num_kv_heads)
    total = sum(place.kv_bytes_per_token(model, "float16") for place in places_of(model, parallel))
    assert total == copies * model.kv_bytes_per_token("float16")


@given(st.integers(1, 200), st.integers(1, 12), st.integers(1, 200_000))
def test_balanced_stages(num_layers: int, num_stages: int, vocab_size: int) -> None:
    model = replace(preset("opt-tiny"), num_layers=max(num_layers, num_stages), vocab_size=vocab_size)
    stages = balanced_stages(model, num_stages)
    assert sum(stages) == model.num_layers
    assert min(stages) >= 1
    layer, vocabulary = model.layer_parameters(), model.vocab_size * model.hidden_size
    weights = [count * layer for count in stages[:-1]] + [stages[-1] * layer + vocabulary]
    # Moving a layer to the lightest stage would make that the heaviest.
    for stage, count in enumerate(stages):
        assert count == 1 or weights[stage] - layer <= min(weights)


def test_balanced_stages_of_presets() -> None:
    assert balanced_stages(preset("opt-125m"), 2) == (9, 3)  # The output projection weighs as much as 5.5 layers,
    assert balanced_stages(preset("opt-66b"), 4) == (16,) * 4  # or half a layer.


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_that_fit_fit(name: str) -> None:
    model = preset(name)
    sizes = tensor_parallel_sizes(model)
    for size in range(1, model.num_heads + 1):
        if size in sizes:
            Place.whole(model)
            replace(Place.whole(model), num_shards=size).require_shards(model)
        else:
            with pytest.raises(ConfigError, match=f"tensor_parallel_size={size} .*sizes that fit: 1"):
                replace(Place.whole(model), num_shards=size).require_shards(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be an integer of at least 1, got 0"),
        ({"pipeline_parallel_size": 2.0}, "pipeline_parallel_size must be an integer of at least 1, got 2.0"),
        ({"pipeline_parallel_size": 2, "stage_layers": (4,)}, "names 1 stages, pipeline_parallel_size is 2"),
        ({"pipeline_parallel_size": 2, "stage_layers": (4, 0)}, "stage_layers must be an integer of at least 1, got 0"),
        ({"pipeline_parallel_size": 99}, "model opt-125m has 12 layers, and a stage needs one at least"),
        ({"pipeline_parallel_size": 2, "stage_layers": (4, 4)}, "8 layers in all, model opt-125m has 12"),
        ({"tensor_parallel_size": 5}, "does not divide the 12 attention heads of model opt-125m"),
    ],
)
def test_what_cannot_be_divided_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**options).place(0, preset("opt-125m"))

"""The parts of a model on several ranks: layers in stages; heads, matrices and the vocabulary in shards.

Ranks are numbered stage by stage, so that the shards of a stage, which talk the most, are neighbours on one machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.core.checks import Integer, require_int
from fastserve.core.config import ModelConfig
from fastserve.core.errors import ConfigError
from fastserve.core.options import check_options, option


def parse_stage_layers(text: str | None) -> tuple[int, ...] | None:
    """Parse `5,7` as numbers."""
    try:
        return None if text is None else tuple(int(layers) for layers in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--stage-layers takes whole numbers with commas between, such as 5,7, not {text!r}"
        ) from None


@dataclass(frozen=True)
class ParallelConfig:
    """How a model is divided over ranks. ConfigError for a value out of range."""

    tensor_parallel_size: int = option(1, "Ranks that share each layer.", Integer(1))
    pipeline_parallel_size: int = option(1, "Stages that the layers are divided into.", Integer(1))
    stage_layers: tuple[int, ...] | None = option(
        None, "Layers of each stage.", parse=parse_stage_layers, metavar="N,N,...", show_default="of equal weight"
    )
    """From the first stage. None: of equal weight, as far as possible (`balanced_stages`)."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.stage_layers is not None:
            object.__setattr__(self, "stage_layers", tuple(self.stage_layers))
            for layers in self.stage_layers:
                require_int("stage_layers", layers, 1)
            if len(self.stage_layers) != self.pipeline_parallel_size:
                raise ConfigError(
                    f"stage_layers={self.stage_layers} names {len(self.stage_layers)} stages, "
                    f"pipeline_parallel_size is {self.pipeline_parallel_size}; give a number for each stage"
                )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def layers_by_stage(self, model: ModelConfig) -> tuple[int, ...]:
        """Layers of each stage. ConfigError if the model's layers cannot be divided so."""
        stages = self.pipeline_parallel_size
        if stages > model.num_layers:
            raise ConfigError(
                f"pipeline_parallel_size={stages}: model {model.name} has {model.num_layers} layers, and a stage needs "
                "one at least"
            )
        if self.stage_layers is None:
            return balanced_stages(model, stages)
        if sum(self.stage_layers) != model.num_layers:
            raise ConfigError(
                f"stage_layers={self.stage_layers} has {sum(self.stage_layers)} layers in all, model {model.name} has "
                f"{model.num_layers}"
            )
        return self.stage_layers

    def rank_kv_bytes_per_token(self, model: ModelConfig, dtype: str) -> int:
        """Bytes of key and value cache one token takes on the rank with the largest part of it."""
        ranks = range(0, self.world_size, self.tensor_parallel_size)  # The shards of a stage have equal parts.
        return max([self.place(rank, model).kv_bytes_per_token(model, dtype) for rank in ranks])

    def place(self, rank: int, model: ModelConfig) -> Place:
        """The part of `model` that `rank` holds. ConfigError if the model cannot be divided so."""
        layers = self.layers_by_stage(model)
        stage, shard = divmod(rank, self.tensor_parallel_size)
        place = Place(
            stage=stage,
            num_stages=self.pipeline_parallel_size,
            shard=shard,
            num_shards=self.tensor_parallel_size,
            first_layer=sum(layers[:stage]),
            num_layers=layers[stage],
        )
        place.require_shards(model)
        return place


@dataclass(frozen=True, slots=True)
class Place:
    """The part of a model that one rank holds."""

    stage: int
    num_stages: int
    shard: int
    num_shards: int
    first_layer: int
    num_layers: int
    """Layers of the stage, from `first_layer`."""

    @classmethod
    def whole(cls, model: ModelConfig) -> Place:
        """The whole model on one rank."""
        return cls(stage=0, num_stages=1, shard=0, num_shards=1, first_layer=0, num_layers=model.num_layers)

    @property
    def is_first_stage(self) -> bool:
        """True for the stage that embeds tokens."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """True for the stage that projects to the vocabulary."""
        return self.stage == self.num_stages - 1

    @property
    def rank(self) -> int:
        """Number of the rank that holds this part."""
        return self.stage * self.num_shards + self.shard

    def __str__(self) -> str:
        return f"stage {self.stage} of {self.num_stages}, shard {self.shard} of {self.num_shards}"

    def require_shards(self, model: ModelConfig) -> None:
        """Raise ConfigError unless the model's heads and inner size divide into so many shards."""
        shards = self.num_shards
        for what, size in (("attention heads", model.num_heads), ("units of the MLP", model.intermediate_size)):
            if size % shards:
                raise ConfigError(
                    f"tensor_parallel_size={shards} does not divide the {size} {what} of model {model.name}; "
                    f"sizes that fit: {', '.join(map(str, tensor_parallel_sizes(model)))}"
                )
        if model.num_kv_heads % shards and shards % model.num_kv_heads:
            raise ConfigError(
                f"tensor_parallel_size={shards} neither divides the {model.num_kv_heads} KV heads of model "
                f"{model.name} nor is a multiple; sizes that fit: {', '.join(map(str, tensor_parallel_sizes(model)))}"
            )
        if shards > model.vocab_size:
            raise ConfigError(f"tensor_parallel_size={shards} exceeds the vocabulary of model {model.name}")

    def heads(self, model: ModelConfig) -> range:
        """Attention heads of the shard."""
        return self._even(model.num_heads)

    def kv_heads(self, model: ModelConfig) -> range:
        """KV heads that the shard's attention heads read. With fewer KV heads than shards, shards share them."""
        if model.num_kv_heads >= self.num_shards:
            return self._even(model.num_kv_heads)
        only = self.shard * model.num_kv_heads // self.num_shards
        return range(only, only + 1)

    def inner(self, model: ModelConfig) -> range:
        """Units of the MLP of the shard."""
        return self._even(model.intermediate_size)

    def vocabulary(self, model: ModelConfig) -> range:
        """Tokens of the shard; shares differ by one token at most."""
        size, shards = model.vocab_size, self.num_shards
        return range(self.shard * size // shards, (self.shard + 1) * size // shards)

    def kv_bytes_per_token(self, model: ModelConfig, dtype: str) -> int:
        """Bytes of key and value cache one token takes on this rank."""
        of_a_head_and_layer = model.kv_bytes_per_token(dtype) // (model.num_layers * model.num_kv_heads)
        return of_a_head_and_layer * self.num_layers * len(self.kv_heads(model))

    def _even(self, size: int) -> range:
        share = size // self.num_shards
        return range(self.shard * share, (self.shard + 1) * share)


def balanced_stages(model: ModelConfig, num_stages: int) -> tuple[int, ...]:
    """Divide the layers so that the stages' shares of the weights are as equal as possible.

    The last stage also has the output projection, which in a small model weighs as much as several layers. The
    embedding does not count: an iteration reads a few of its rows.
    """
    layer, vocabulary = model.layer_parameters(), model.vocab_size * model.hidden_size
    layers = [1] * num_stages
    weights = [layer] * (num_stages - 1) + [layer + vocabulary]
    for _ in range(model.num_layers - num_stages):
        lightest = weights.index(min(weights))
        layers[lightest] += 1
        weights[lightest] += layer
    return tuple(layers)


def tensor_parallel_sizes(model: ModelConfig) -> list[int]:
    """Sizes into which the model's heads and its inner size divide."""
    return [
        size
        for size in range(1, model.num_heads + 1)
        if not model.num_heads % size
        and not model.intermediate_size % size
        and (not model.num_kv_heads % size or not size % model.num_kv_heads)
    ]

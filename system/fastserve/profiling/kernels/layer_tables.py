"""Kernel tables by layer, as LLMServingSim's profiler writes them: one model and one GPU a folder, in microseconds.

`dense.csv` holds a layer's matrix products and element-wise work by tokens, `attention.csv` a layer's attention by
chunk, cached prefix, decodes and their context, `per_sequence.csv` LM head and sampler by sequences, and `meta.yaml`
says of what they are. Tables of several tensor-parallel sizes are in folders `tp1`, `tp2` and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fastserve.core.config import ModelConfig
from fastserve.core.errors import ConfigError
from fastserve.core.presets import PRESETS
from fastserve.latency.gpus import gpu_called
from fastserve.latency.kernel_tables import Curve, KernelTables
from fastserve.profiling.kernels.curves import check_unit, curve
from fastserve.profiling.kernels.imported import ImportedKernels
from fastserve.profiling.kernels.rows import Row, read_rows

_UNIT_S, _UNIT = 1e-6, "microseconds"
_REMEDY = "Give the folder in which LLMServingSim's profiler left dense.csv, per_sequence.csv, attention.csv, meta.yaml"
_ONCE = ("embedding", "final_layernorm")
"""Layers of `dense.csv` that a model has once."""
_TWICE = ("layernorm",)
"""Layers of `dense.csv` that each decoder layer has twice."""
_NEEDED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", *_TWICE, *_ONCE)
_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
_SHAPES = {
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "vocab_size": "vocab_size",
}
"""Shapes that `meta.yaml` names, by their names in `ModelConfig`. It gives those of a shard."""


def read_layer_tables(
    folder: Path, model: ModelConfig, tensor_parallel_size: int, memory_gb: float | None = None
) -> ImportedKernels:
    """Read the tables of `model`'s shard, for one stage with all its layers.

    The tables may be of a model with another number of layers; ConfigError for one of other shapes, for another
    tensor-parallel size, and for a table with a missing column, a hole or a time that cannot be.
    """
    meta_path, tables = _locate(folder, tensor_parallel_size)
    meta = _read_meta(meta_path)
    _check_model(meta_path, meta, model)
    _check_size(meta_path, meta, folder, tensor_parallel_size)
    dense = _read_dense(tables / "dense.csv", model.num_layers)
    per_sequence = _read_per_sequence(tables / "per_sequence.csv")
    attention = _Attention(tables / "attention.csv", model.num_layers)
    layer_s = (dense.seconds[0] + attention.decode[0][1].seconds[0]) / model.num_layers
    check_unit(f"{tables / 'dense.csv'} and attention.csv", layer_s, _UNIT)
    unequal = _unequal_contexts(meta, tensor_parallel_size)
    gpu = gpu_called(_text(meta_path, meta, "gpu"), str(meta_path), memory_gb)
    warnings: tuple[str, ...] = ()
    if tensor_parallel_size > 1:
        warnings = ("these tables hold no all-reduces among shards; their time is missing in every iteration",)
    return ImportedKernels(
        stages=(
            KernelTables(
                dense=dense,
                per_sequence=per_sequence,
                decode=attention.decode,
                prompts=attention.prompts,
                prompts_by_length=False,
                mixed=attention.mixed,
                unequal_contexts=unequal,
            ),
        ),
        gpu=gpu,
        engine=f"kernels of vLLM {_text(meta_path, meta, 'vllm_version')}",
        dtype=_dtype(meta_path, meta),
        stage_link=None,
        provenance={
            "source": f"kernel tables in LLMServingSim's layout: {meta.get('model')} on {gpu.name}",
            "kernels": f"vLLM {meta['vllm_version']}, CUDA {meta.get('cuda_version')}, {meta.get('profiled_at')}",
            "method": (
                f"one layer's times x {model.num_layers} layers; layernorm twice a layer; embedding, final_layernorm, "
                "LM head and sampler once"
            ),
            "mixed_iterations": "attention measured for chunk, prefix, decodes and context together",
            "unequal_contexts": (
                f"{unequal}: fitted by the authors of the tables (alpha_default)" if unequal else "not measured"
            ),
            "error": "kernels alone: an engine's own time is not in them",
        },
        warnings=warnings,
    )


def _locate(folder: Path, tensor_parallel_size: int) -> tuple[Path, Path]:
    """The file `meta.yaml` and the folder of the tables."""
    of_size = folder / f"tp{tensor_parallel_size}"
    tables = of_size if of_size.is_dir() else folder
    found = [path for path in (tables / "meta.yaml", folder / "meta.yaml") if path.is_file()]
    if not found:
        raise ConfigError(f"{folder / 'meta.yaml'} does not exist. {_REMEDY}")
    return found[0], tables


def _read_meta(path: Path) -> Mapping[str, Any]:
    try:
        meta = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(meta, dict):
        raise ConfigError(f"{path} holds {type(meta).__name__}, not keys and values. {_REMEDY}")
    return meta


def _text(path: Path, meta: Mapping[str, Any], key: str) -> str:
    if not isinstance(meta.get(key), str):
        raise ConfigError(f"{path}: {key} is {meta.get(key)!r}; it must be a text. {_REMEDY}")
    return str(meta[key])


def _dtype(path: Path, meta: Mapping[str, Any]) -> str:
    variant = _text(path, meta, "variant")
    if variant not in _DTYPES:
        raise ConfigError(f"{path}: variant is {variant!r}; tables are read of {' and '.join(_DTYPES)} only")
    return _DTYPES[variant]


def _degrees(path: Path, meta: Mapping[str, Any]) -> list[int]:
    degrees = meta.get("tp_degrees")
    if not isinstance(degrees, list) or not degrees or not all(type(size) is int and size > 0 for size in degrees):
        raise ConfigError(f"{path}: tp_degrees is {degrees!r}; it must be a list of numbers of shards, such as [1, 2]")
    return degrees


def _check_size(path: Path, meta: Mapping[str, Any], folder: Path, tensor_parallel_size: int) -> None:
    """Tables without folders by size are of the first size that the file names."""
    degrees = _degrees(path, meta)
    there = [size for size in degrees if (folder / f"tp{size}").is_dir()] or degrees[:1]
    if tensor_parallel_size not in there:
        raise ConfigError(
            f"{path}: tensor_parallel_size is {tensor_parallel_size}, and the tables are of "
            f"{', '.join(map(str, there))} (tp_degrees); tables of more sizes are in folders tp1, tp2 and so on"
        )


def _check_model(path: Path, meta: Mapping[str, Any], model: ModelConfig) -> None:
    """Raise ConfigError unless the tables are of a model of these shapes. The number of layers may differ."""
    name = _text(path, meta, "model")
    effective = meta.get("engine_effective")
    shapes = effective.get("hf_overrides") if isinstance(effective, dict) else None
    if not isinstance(shapes, dict) or any(type(shapes.get(key)) is not int for key in _SHAPES):
        raise ConfigError(
            f"{path}: engine_effective.hf_overrides must have numbers for {', '.join(_SHAPES)}, the shapes of the model"
        )
    degrees = _degrees(path, meta)
    # The shapes are those of a shard, of whichever size was profiled last.
    whole = [{key: shapes[key] * size for key in _SHAPES} for size in degrees]
    wanted = {key: getattr(model, field) for key, field in _SHAPES.items()}
    if wanted not in whole:
        key = next(key for key in _SHAPES if whole[0][key] != wanted[key])
        raise ConfigError(
            f"{path}: the tables are of {name}, whose {key} is {' or '.join(str(each[key]) for each in whole)}; model "
            f"{model.name} has {wanted[key]}. Give the tables' model, or tables of this one"
        )
    known = PRESETS.get(name.rpartition("/")[2].lower())
    for field in ("hidden_size", "head_dim"):
        if known is not None and getattr(known, field) != getattr(model, field):
            raise ConfigError(
                f"{path}: the tables are of {name}, whose {field} is {getattr(known, field)}; model {model.name} has "
                f"{getattr(model, field)}. Give the tables' model, or tables of this one"
            )


def _unequal_contexts(meta: Mapping[str, Any], tensor_parallel_size: int) -> float:
    """How much longer decodes of unequal contexts take, as the tables' authors fitted it; 0 where they did not."""
    found: Any = meta
    for key in ("skew_fit", "per_tp", tensor_parallel_size, "alpha_default"):
        found = found.get(key) if isinstance(found, dict) else None
    return float(found) if isinstance(found, int | float) else 0.0


def _read_dense(path: Path, num_layers: int) -> Curve:
    """Seconds of all layers by tokens. Each layer of the table must have the same numbers of tokens."""
    layers: dict[str, dict[int, float]] = {}
    for row in read_rows(path, ("layer", "tokens", "time_us"), _REMEDY):
        _add(row, layers.setdefault(row.text("layer"), {}), row.integer("tokens", 1))
    _require_layers(path, layers, _NEEDED)
    total: dict[int, float] = dict.fromkeys(next(iter(layers.values())), 0.0)
    for name, seconds in layers.items():
        if other := set(seconds) ^ set(total):
            raise ConfigError(
                f"{path}: {name} and {next(iter(layers))} have other numbers of tokens, such as {min(other)}; give "
                "each layer a row for each"
            )
        times = 1 if name in _ONCE else num_layers * (2 if name in _TWICE else 1)
        for tokens, value in seconds.items():
            total[tokens] += times * value
    return curve(total)


def _read_per_sequence(path: Path) -> Curve:
    layers: dict[str, dict[int, float]] = {}
    for row in read_rows(path, ("layer", "sequences", "time_us"), _REMEDY):
        _add(row, layers.setdefault(row.text("layer"), {}), row.integer("sequences", 1))
    _require_layers(path, layers, ("lm_head", "sampler"))
    total: dict[int, float] = {}
    for name, seconds in layers.items():
        if other := set(seconds) ^ set(next(iter(layers.values()))):
            raise ConfigError(
                f"{path}: {name} has other numbers of sequences, such as {min(other)}; give each layer all"
            )
        for sequences, value in seconds.items():
            total[sequences] = total.get(sequences, 0.0) + value
    return curve(total)


def _require_layers(path: Path, layers: Mapping[str, object], needed: tuple[str, ...]) -> None:
    missing = [name for name in needed if name not in layers]
    if missing:
        raise ConfigError(f"{path}: no row of layer {missing[0]!r}; needed: {', '.join(needed)}. {_REMEDY}")


def _add(row: Row, seconds: dict[int, float], at: int) -> None:
    if at in seconds:
        row.fail("this point is in the table twice; remove one of the rows")
    seconds[at] = row.seconds("time_us", _UNIT_S)


class _Attention:
    """`attention.csv` by kinds of iterations, in seconds over all layers."""

    def __init__(self, path: Path, num_layers: int) -> None:
        prompts: dict[int, dict[int, float]] = {}
        decode: dict[int, dict[int, float]] = {}
        mixed: dict[tuple[int, int, int], dict[int, float]] = {}
        columns = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
        for row in read_rows(path, (*columns, "time_us"), _REMEDY):
            chunk, prefix, decodes, context = (row.integer(column) for column in columns)
            if not chunk and not decodes:
                row.fail("prefill_chunk and n_decode are both 0, so there is nothing to compute; remove the row")
            if not chunk and prefix:
                row.fail(f"kv_prefill is {prefix} without a chunk; it must be 0 where prefill_chunk is 0")
            if bool(decodes) != bool(context):
                row.fail(f"n_decode is {decodes} and kv_decode {context}; both are 0, or both are above")
            if not decodes:
                _add(row, prompts.setdefault(chunk, {}), prefix)
            elif not chunk:
                _add(row, decode.setdefault(decodes, {}), context)
            else:
                _add(row, mixed.setdefault((chunk, prefix, decodes), {}), context)
        for found, what in (
            (prompts, "n_decode 0, chunks of prompts alone"),
            (decode, "prefill_chunk 0, decodes alone"),
        ):
            if not found:
                raise ConfigError(f"{path}: no row with {what}; profile them too")
        for chunk, seconds in sorted(prompts.items()):
            if 0 not in seconds:
                raise ConfigError(
                    f"{path}: no row with prefill_chunk {chunk}, kv_prefill 0, n_decode 0; profile it too"
                )
        if 1 not in decode:
            raise ConfigError(f"{path}: no row with prefill_chunk 0 and n_decode 1, one decode alone; profile it too")

        def all_layers(seconds: dict[int, float]) -> Curve:
            return curve({at: num_layers * value for at, value in seconds.items()})

        self.prompts = tuple((chunk, all_layers(prompts[chunk])) for chunk in sorted(prompts))
        self.decode = tuple((decodes, all_layers(decode[decodes])) for decodes in sorted(decode))
        self.mixed = tuple((*numbers, all_layers(mixed[numbers])) for numbers in sorted(mixed))

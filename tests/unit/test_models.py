"""Greedy tokens equal those of transformers, whatever chunking, batching and swapping did in between."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from fastserve.core.clock import WallClock
from fastserve.core.config import ModelConfig
from fastserve.core.errors import ConfigError
from fastserve.core.presets import preset
from fastserve.kvcache import Direction
from fastserve.runtime.models import Part, SequenceInput, empty_model, load_config
from fastserve.runtime.worker import Worker
from fastserve.runtime.worker.copier import make_copier

GREEDY = SimpleNamespace(temperature=0.0, top_p=1.0, top_k=0, seed=None)
PROMPTS = [list(range(5, 5 + n)) for n in (1, 3, 8, 21, 40)]
OUTPUT, BLOCK, BLOCKS_EACH = 20, 8, 8


def opt() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=211,
            hidden_size=32,
            word_embed_proj_dim=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            ffn_dim=80,
            max_position_embeddings=96,
            init_std=0.3,
        )
    )


def llama(**overrides: Any) -> PreTrainedModel:
    fields: dict[str, Any] = {
        "vocab_size": 211,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 72,
        "max_position_embeddings": 96,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**fields | overrides))


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "opt": opt,
    "llama-gqa": llama,
    "llama-tied-mha-head-dim": lambda: llama(tie_word_embeddings=True, num_key_value_heads=4, head_dim=16),
    "llama3-rope": lambda: llama(rope_parameters=LLAMA3_ROPE),
}


def reference(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=OUTPUT, do_sample=False, eos_token_id=None
    )
    return output[0, len(prompt) :].tolist()


def save(make: Callable[[], PreTrainedModel], directory: Path, **options: Any) -> list[list[int]]:
    """Save a model of fixed seed in `directory`; returns what transformers generates from PROMPTS."""
    torch.manual_seed(1)
    model = make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases and norms that do nothing would hide a mistake
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif name.endswith("embed_tokens.weight"):
                parameter.normal_(0, 0.3)
    model.save_pretrained(directory, **options)
    return [reference(model, prompt) for prompt in PROMPTS]


def worker_of(directory: Path, **options: Any) -> Worker:
    fields: dict[str, Any] = {"num_gpu_blocks": 64, "num_host_blocks": 64, "block_size": BLOCK, "model_dir": directory}
    return Worker(load_config(directory), **fields | options)


def move(worker: Worker, direction: Direction, source: Sequence[int], destination: Sequence[int]) -> None:
    """Copy blocks between the worker's pools, and wait for it."""
    copier = make_copier(worker.gpu_cache, worker.host_cache, WallClock())
    copier.start(direction, source, destination, None)
    copier.close()
    copier.finished()


def generate(worker: Worker, chunk: int = 1000, swap: bool = False) -> list[list[int]]:
    """Run PROMPTS together, prefilled in chunks; with `swap`, each moves by way of the host now and then."""
    free = list(range(len(PROMPTS) * BLOCKS_EACH, 64))
    tables = [list(range(row * BLOCKS_EACH, (row + 1) * BLOCKS_EACH)) for row in range(len(PROMPTS))]
    tokens, computed = [list(prompt) for prompt in PROMPTS], [0] * len(PROMPTS)
    step = 0
    while any(len(t) < len(p) + OUTPUT for t, p in zip(tokens, PROMPTS, strict=True)):
        step += 1
        running = [i for i, t in enumerate(tokens) if len(t) < len(PROMPTS[i]) + OUTPUT and (i + step) % 7]
        if swap and running and step % 3 == 0:
            row = running[step % len(running)]
            host = list(range(40, 40 + BLOCKS_EACH))
            move(worker, Direction.OUT, tables[row], host)
            worker.gpu_cache[tables[row]] = torch.nan
            tables[row], free = free[:BLOCKS_EACH], free[BLOCKS_EACH:] + tables[row]
            move(worker, Direction.IN, host, tables[row])
        inputs = [SequenceInput(tokens[i][computed[i] : computed[i] + chunk], computed[i], tables[i]) for i in running]
        results = worker.execute(inputs, [GREEDY] * len(inputs)) if inputs else []
        for i, sequence, token in zip(running, inputs, results, strict=True):
            computed[i] += len(sequence.token_ids)
            if computed[i] == len(tokens[i]):
                tokens[i].append(token)
    return [t[len(p) :] for t, p in zip(tokens, PROMPTS, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family: str, tmp_path: Path) -> None:
    wanted = save(FAMILIES[family], tmp_path)
    assert len({token for tokens in wanted for token in tokens}) > 20  # a model that repeats itself proves nothing
    worker = worker_of(tmp_path)
    worker.gpu_cache.fill_(torch.nan)
    assert generate(worker) == wanted
    assert generate(worker, chunk=7) == wanted
    assert generate(worker, chunk=5, swap=True) == wanted


@pytest.mark.parametrize("family", ["opt", "llama-gqa"])
def test_sharded_checkpoint_equals_transformers(family: str, tmp_path: Path) -> None:
    wanted = save(FAMILIES[family], tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert generate(worker_of(tmp_path)) == wanted


@pytest.mark.parametrize("rope", [None, LLAMA3_ROPE], ids=["default", "llama3"])
def test_config_keys_of_transformers_4(rope: dict[str, Any] | None, tmp_path: Path) -> None:
    """Version 4 wrote rope_theta and rope_scaling where version 5 writes rope_parameters."""
    parameters = rope or {"rope_type": "default", "rope_theta": 500.0}
    wanted = save(lambda: llama(rope_parameters=parameters), tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    written = fields.pop("rope_parameters")
    fields["rope_theta"] = written.pop("rope_theta")
    fields["rope_scaling"] = written if rope else None
    path.write_text(json.dumps(fields))
    assert generate(worker_of(tmp_path)) == wanted


def test_unpacked_weights_give_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine without oneDNN's packed layout runs."""
    wanted = save(opt, tmp_path)
    monkeypatch.setattr("fastserve.runtime.models.layers.Linear.pack", lambda self: None)
    assert generate(worker_of(tmp_path)) == wanted


@pytest.mark.parametrize("name", ["opt-tiny", "llama-tiny"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dummy_output_varies_and_depends_on_the_seed_alone(name: str, dtype: str) -> None:
    def run(seed: int) -> list[list[int]]:
        return generate(
            Worker(preset(name), num_gpu_blocks=64, num_host_blocks=0, block_size=BLOCK, dtype=dtype, seed=seed)
        )

    first = run(0)
    assert first == run(0)
    assert first != run(1)
    for tokens in first:
        assert len(set(tokens)) > OUTPUT // 2


def test_blocks_can_be_copied_while_others_are_computed() -> None:
    worker = Worker(preset("opt-tiny"), num_gpu_blocks=64, num_host_blocks=16, block_size=BLOCK)
    wanted = generate(worker)
    spare = list(range(48, 64))
    content = torch.randn(worker.gpu_cache[spare].shape)
    worker.gpu_cache[spare] = content
    stop = threading.Event()

    def shuttle() -> None:
        while not stop.is_set():
            move(worker, Direction.OUT, spare, range(16))
            move(worker, Direction.IN, range(16), spare[::-1])
            move(worker, Direction.OUT, spare[::-1], range(16))
            move(worker, Direction.IN, range(16), spare)

    thread = threading.Thread(target=shuttle)
    thread.start()
    try:
        assert generate(worker) == wanted
    finally:
        stop.set()
        thread.join()
    assert torch.equal(worker.gpu_cache[spare], content)


def test_dummy_weights_have_the_parameters_the_configuration_counts() -> None:
    for name in ("opt-tiny", "llama-tiny"):
        config = preset(name)
        model = empty_model(Part.whole(config, torch.bfloat16, torch.device("meta")))
        counted = sum(weight.target.numel() for weight in model.weights())
        assert counted == pytest.approx(config.num_parameters(), rel=0.01)


def huge() -> ModelConfig:
    return replace(preset("opt-tiny"), name="huge", num_layers=4_000_000)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            preset("opt-tiny"),
            {"num_gpu_blocks": 10**9},
            r"model opt-tiny in float32 with 1000000000 GPU blocks .* needs .* GiB, but cpu has .* GiB available; "
            r"lower num_gpu_blocks or num_host_blocks \(or swap_space_gib_per_gpu\)",
        ),
        (preset("opt-tiny"), {"num_host_blocks": 10**9}, "1000000000 host blocks"),
        (huge(), {}, "model huge"),
        (preset("opt-tiny"), {"num_gpu_blocks": 0}, "num_gpu_blocks must be an integer of at least 1, got 0"),
        (preset("opt-tiny"), {"dtype": "int3"}, "unknown dtype 'int3'; known: float32"),
        (preset("opt-tiny"), {"device": "tpu9"}, "unknown device 'tpu9'"),
        (preset("opt-tiny"), {"device": "meta"}, "device 'meta' is not supported"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_allocated(
    config: ModelConfig, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Worker(config, **{"num_gpu_blocks": 8, "num_host_blocks": 8, "block_size": 16} | options)

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from fastserve import LLM, SamplingParams  # noqa: E402
from fastserve.core.errors import CheckpointError, ConfigError  # noqa: E402

SMALL = {"load_format": "dummy", "num_gpu_blocks": 64, "num_host_blocks": 64, "max_batch_size": 4}


def test_generate_as_the_readme_shows() -> None:
    with LLM("opt-tiny", policy="fastserve", device="cpu", dtype="float32", block_size=16, seed=0, **SMALL) as llm:
        params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
        outputs = llm.generate(prompt_token_ids=[[1, 2, 3], [4, 5]], sampling_params=params)
        again = llm.generate(prompt_token_ids=[[1, 2, 3]], sampling_params=params)
    assert [len(output.token_ids) for output in outputs] == [16, 16]
    assert outputs[0].prompt_token_ids == [1, 2, 3]
    assert outputs[0].metrics.preemptions == 0
    assert outputs[0].metrics.output_tokens == 16
    assert again[0].token_ids == outputs[0].token_ids


def test_one_too_long_is_reported_and_the_rest_served() -> None:
    with LLM("opt-tiny", policy="vllm", **SMALL) as llm:
        outputs = llm.generate(
            prompt_token_ids=[[1] * 2047, [1, 2]], sampling_params=SamplingParams(max_tokens=4, ignore_eos=True)
        )
    assert "exceeds the model's context of 2048 tokens" in outputs[0].error
    assert outputs[0].token_ids == []
    assert len(outputs[1].token_ids) == 4


def test_any_end_of_sequence_token_ends_a_text() -> None:
    prompt = {"prompt_token_ids": [[1, 2, 3]]}
    with LLM("opt-tiny", policy="fastserve-fcfs", **SMALL) as llm:
        (free,) = llm.generate(**prompt, sampling_params=SamplingParams(max_tokens=16, ignore_eos=True))
        end = free.token_ids[4]
        stopped_at = free.token_ids.index(end) + 1
        llm.engine.eos_token_ids = (60_000, end)
        (ended,) = llm.generate(**prompt, sampling_params=SamplingParams(max_tokens=16))
        (ignored,) = llm.generate(**prompt, sampling_params=SamplingParams(max_tokens=16, ignore_eos=True))
    assert ended.token_ids == free.token_ids[:stopped_at]
    assert ignored.token_ids == free.token_ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "opt-126m"}, "unknown model preset 'opt-126m'; known: opt-tiny"),
        ({"model": "./nowhere"}, "model directory './nowhere' does not exist"),
        ({"load_format": "auto"}, "preset 'opt-tiny' has no weights"),
        ({"load_format": "gguf"}, "load_format must be auto or dummy, got 'gguf'"),
        ({"policy": "best"}, "unknown policy 'best'"),
        ({"policy_options": {"speed": 1}}, "unknown option 'speed' for policy 'fastserve'"),
        ({"tensor_parallel_size": 5}, "tensor_parallel_size=5 does not divide"),
        ({"dtype": "int4"}, "int4"),
        ({"device": "abacus"}, "abacus"),
        ({"num_gpu_blocks": 10**9}, "lower num_"),
        ({"block_size": 0}, "block_size must be an integer of at least 1, got 0"),
        ({"swap_space_gib_per_gpu": 1.0}, "num_host_blocks=64 and swap_space_gib_per_gpu=1 both say"),
        ({"num_host_blocks": None, "swap_space_gib_per_gpu": 10**6}, "or swap_space_gib_per_gpu"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(**({"model": "opt-tiny", **SMALL} | arguments))
    assert message in str(caught.value)


def test_the_host_pool_takes_the_swap_space_given() -> None:
    with LLM("opt-tiny", **SMALL | {"num_host_blocks": None, "swap_space_gib_per_gpu": 0.01}) as llm:
        assert llm.worker is not None
        blocks, pool = llm.engine.kv.config.num_host_blocks, llm.worker.host_cache
        assert len(pool) == blocks
        assert pool.nbytes <= 0.01 * 2**30 < pool.nbytes + pool[0].nbytes


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        LLM(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "give either prompts or prompt_token_ids"),
        ({"prompts": "hello", "prompt_token_ids": [[1]]}, "give either prompts or prompt_token_ids"),
        ({"prompt_token_ids": [[]]}, "an empty prompt"),
        ({"prompt_token_ids": [[1, 60_000]]}, "token id 60000"),
        ({"prompt_token_ids": [[1]], "sampling_params": []}, "1 prompts but 0 sampling_params"),
    ],
)
def test_wrong_prompts_are_named(call: dict, message: str) -> None:
    with LLM("opt-tiny", policy="fastserve-fcfs", **SMALL) as llm, pytest.raises(ConfigError) as caught:
        llm.generate(**call)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
        ({"top_k": -1}, "top_k must be an integer of at least 0, got -1"),
    ],
)
def test_wrong_sampling_params_are_named(params: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**params)

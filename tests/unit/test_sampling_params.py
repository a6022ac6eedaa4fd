"""SamplingParams say what is wrong with them; LLM makes n outputs, cuts prompts and tells log probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fastserve.core.errors import ConfigError
from fastserve.core.request import SamplingParams


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"n": 0}, "n must be"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
        ({"min_p": float("nan")}, r"min_p must be in \[0, 1\], got nan"),
        ({"min_tokens": 17}, "min_tokens=17 is more than max_tokens=16"),
        ({"presence_penalty": 2.1}, r"presence_penalty must be in \[-2, 2\], got 2.1"),
        ({"frequency_penalty": float("nan")}, r"frequency_penalty must be in \[-2, 2\], got nan"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a finite number above 0, got 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be a finite number above 0, got inf"),
        ({"logit_bias": {5: 101.0}}, r"logit_bias of token 5 must be in \[-100, 100\], got 101.0"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"logprobs": 21}, "logprobs must be at most 20, got 21"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be"),
    ],
)
def test_what_is_out_of_range_is_named(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SamplingParams(**asked)


def test_a_conflict_with_the_model_names_the_field() -> None:
    assert SamplingParams(allowed_token_ids=(3, 9), min_tokens=1, stop_token_ids=(9,)).conflict(10, (2,)) is None
    for params, field in (
        (SamplingParams(allowed_token_ids=(10,)), "allowed_token_ids"),
        (SamplingParams(logit_bias={-1: 1.0}), "logit_bias"),
        (SamplingParams(allowed_token_ids=(2, 9), min_tokens=1, stop_token_ids=(9,)), "allowed_token_ids"),
    ):
        conflict = params.conflict(10, (2,))
        assert conflict is not None
        assert conflict[0] == field
        assert conflict[1].startswith(field)
        assert params.conflict(None, (2,)) is None


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    pytest.importorskip("torch")
    from fastserve import LLM

    with LLM(
        "opt-tiny", load_format="dummy", policy="fastserve-fcfs", num_gpu_blocks=64, num_host_blocks=0, tokenizer="none"
    ) as made:
        yield made


def test_n_outputs_draw_with_one_seed_after_the_other(llm: Any) -> None:
    def params(**asked: Any) -> SamplingParams:
        return SamplingParams(max_tokens=8, temperature=1.0, ignore_eos=True, **asked)

    both = llm.generate(prompt_token_ids=[[5, 6, 7], [8]], sampling_params=[params(n=3, seed=4), params(seed=9)])
    assert [len(output.outputs) for output in both] == [3, 1]
    assert [one.index for one in both[0].outputs] == [0, 1, 2]
    alone = [
        llm.generate(prompt_token_ids=[[5, 6, 7]], sampling_params=params(seed=4 + i))[0].token_ids for i in range(3)
    ]
    assert [one.token_ids for one in both[0].outputs] == alone
    assert both[0].token_ids == alone[0]
    assert both[0].request_id.isdigit()
    assert len({one.metrics.request_id for one in both[0].outputs}) == 3


def test_prompts_are_cut_from_the_left(llm: Any) -> None:
    prompt = list(range(4, 44))

    def used(most: int | None, max_tokens: int = 4) -> list[int]:
        params = SamplingParams(max_tokens=max_tokens, truncate_prompt_tokens=most)
        tokens: list[int] = llm.generate(prompt_token_ids=[prompt], sampling_params=params)[0].prompt_token_ids
        return tokens

    assert used(None) == used(-1) == used(100) == prompt
    assert used(3) == prompt[-3:]
    longest = llm.engine.longest_request
    assert used(-1, longest - 10) == prompt[-10:]


def test_scores_come_only_where_asked(llm: Any) -> None:
    asked = SamplingParams(max_tokens=5, logprobs=2, prompt_logprobs=0, ignore_eos=True)
    plain, told = llm.generate(
        prompt_token_ids=[[5, 6, 7]] * 2, sampling_params=[SamplingParams(max_tokens=5, ignore_eos=True), asked]
    )
    assert plain.prompt_logprobs is plain.outputs[0].logprobs is None
    assert plain.token_ids == told.token_ids
    assert [one.token_id for one in told.outputs[0].logprobs] == told.token_ids
    assert all(one.rank == 1 and one.top[0] == (one.token_id, one.logprob) for one in told.outputs[0].logprobs)
    assert told.prompt_logprobs[0] is None
    assert [one.token_id for one in told.prompt_logprobs[1:]] == [6, 7]


def test_a_model_refuses_tokens_it_does_not_have(llm: Any) -> None:
    size = llm.model_config.vocab_size
    with pytest.raises(ConfigError, match=f"allowed_token_ids: token id {size}; the model's vocabulary has ids from 0"):
        llm.generate(prompt_token_ids=[[5]], sampling_params=SamplingParams(allowed_token_ids=(size,)))


def test_a_simulation_rejects_log_probabilities() -> None:
    from fastserve.core.request import Request, RequestStatus
    from fastserve.latency import load_profile
    from fastserve.simulation import simulated_engine

    engine = simulated_engine(load_profile("a100-80g/opt-13b-tp1-swifttransformer"))
    job = engine.add_request(Request("a", 0.0, 4), SamplingParams(logprobs=1))
    assert job.request.status is RequestStatus.REJECTED
    assert job.error.startswith("request a: logprobs and prompt_logprobs need a model")
    assert not engine.has_unfinished


def test_a_stop_token_has_text_only_if_asked_for() -> None:
    pytest.importorskip("torch")
    from fastserve import LLM

    with LLM("opt-tiny", load_format="dummy", policy="fastserve-fcfs", num_gpu_blocks=64, num_host_blocks=0) as llm:

        def ask(**asked: Any) -> Any:
            params = SamplingParams(max_tokens=6, ignore_eos=True, **asked)
            return llm.generate(prompt_token_ids=[[5, 6, 7]], sampling_params=params)[0]

        plain = ask(allowed_token_ids=(300,))  # The same token over and over, so the first is the end.
        once = ask(allowed_token_ids=(300,), stop_token_ids=(300,), include_stop_str_in_output=True)
        hidden = ask(allowed_token_ids=(300,), stop_token_ids=(300,))
        later = ask(allowed_token_ids=(300, 301), stop_token_ids=(300,), min_tokens=5, logit_bias={300: 100.0})
    assert plain.token_ids == [300] * 6
    assert once.token_ids == hidden.token_ids == [300]
    assert once.text
    assert plain.text == once.text * 6
    assert hidden.text == ""
    assert later.token_ids == [301] * 5 + [300]

"""Fields that requests for completions and for chats have in common."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from fastserve.core.logprobs import MOST_LOGPROBS
from fastserve.core.request import SamplingParams
from fastserve.server.protocol.fields import (
    INT32,
    INT64,
    Body,
    Neutral,
    TokenId,
    encodable,
    field_error,
    is_list,
    is_text,
    kind_of,
)

MAX_STOP_TEXTS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_CHOICES = 128
"""Outputs for one prompt."""
MAX_BIASED = 1024
"""Token ids in `logit_bias`."""
MAX_ALLOWED = 16384
"""Token ids in `allowed_token_ids`."""


def _few_biased(value: Any) -> Any:
    # pydantic reports every wrong key and value before it looks at the length.
    if isinstance(value, dict) and len(value) > MAX_BIASED:
        raise ValueError(f"at most {MAX_BIASED} tokens may have a bias, not {len(value)}")
    return value


StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS), AfterValidator(encodable)]
BiasField = Annotated[
    dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASED), BeforeValidator(_few_biased)
]
StopField = Annotated[
    Annotated[StopText, Tag("<text>")]
    | Annotated[list[StopText], Field(max_length=MAX_STOP_TEXTS, fail_fast=True), Tag("<texts>")],
    Discriminator(
        kind_of(text=is_text, texts=is_list),
        custom_error_type="stop",
        custom_error_message="Input should be a text or a list of texts",
    ),
]


class StreamOptions(Body):
    """What a stream's events say beside the tokens."""

    include_usage: bool = False
    """Whether a last event, without choices, says how many tokens there were."""
    continuous_usage_stats: bool = False
    """Not OpenAI's: whether each event says how many tokens its choice has until then."""


class GenerationRequest(Body):
    """What requests for completions and for chats have in common."""

    model: str | None = None
    """A name of GET /v1/models. Left out: the model that is served."""
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=INT32)
    """Not OpenAI's: how many of the likeliest tokens are drawn from; 0 or -1 for all."""
    seed: int | None = Field(None, ge=-INT64 - 1, le=INT64)
    stop: StopField | None = None
    """Texts that end the output."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None = None
    """Not OpenAI's: tokens that end the output; they are part of it, without text."""
    ignore_eos: bool = False
    """Not OpenAI's: continue to `max_tokens` whatever is generated."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    """Not OpenAI's: return `token_ids` beside every text."""
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    """Outputs for each prompt. Output i draws with `seed` + i."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: BiasField = Field({})
    """Token ids and the number added to the logit of each."""
    repetition_penalty: float = Field(1.0, gt=0, le=INT32)
    """Not OpenAI's, as are all fields that follow; their meanings are vLLM's."""
    min_p: float = Field(0.0, ge=0, le=1)
    min_tokens: int = Field(0, ge=0, le=INT32)
    """Tokens before which no end of sequence and no stop token is drawn, and no stop text is looked for."""
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED, fail_fast=True)] | None = (
        None
    )
    """The only tokens that can be drawn."""
    include_stop_str_in_output: bool = False
    """Whether the text ends with the stop text or the stop token's text."""
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=INT32)
    """Use only so many tokens at the prompt's end; -1: as many as there is room for."""
    prompt_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    """Return the log probability of every prompt token, and of so many of the likeliest tokens at its position."""

    NEUTRAL: ClassVar[Neutral] = {
        # How tokens are drawn.
        "best_of": (1,),
        "bad_words": ([],),
        "logits_processors": ([],),
        "watermarking": (False,),
        "use_beam_search": (False,),
        "length_penalty": (1,),
        "early_stopping": (False,),
        "repetition_detection": (),
        "thinking_token_budget": (-1,),
        # The form of the output.
        "response_format": ({"type": "text"},),
        "structured_outputs": (),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "guided_grammar": (),
        "guided_decoding_backend": (),
        "guided_whitespace_pattern": (),
        "structural_tag": (),
        # What is read and what is returned.
        "logprob_token_ids": (),
        "return_tokens_as_token_ids": (False,),
        "truncation_side": ("left",),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "stream_interval": (1,),
        # How a request is served.
        "priority": (0,),
        "kv_transfer_params": (),
        "ec_transfer_params": (),
        "vllm_xargs": ({},),
        # Fields of other servers (SGLang, llama.cpp, OpenRouter).
        "regex": (),
        "ebnf": (),
        "grammar": ("",),
        "json_schema": (),
        "typical_p": (1,),
        "top_a": (0,),
        "mirostat": (0,),
        "dynatemp_range": (0,),
        "dry_multiplier": (0,),
        "xtc_probability": (0,),
    }

    @model_validator(mode="after")
    def _check(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise field_error("stream_options", "for stream: true only; leave it out")
        if self.prompt_logprobs is not None and self.stream:
            raise field_error("prompt_logprobs", "not with stream: true; leave one of them out")
        if self.truncate_prompt_tokens == 0:
            raise field_error("truncate_prompt_tokens", "a prompt needs at least one token; -1 is as many as fit")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told beside each new token; None: no log probabilities."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told beside each prompt token; None: no log probabilities."""
        return self.prompt_logprobs

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts that end the output."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling_params(self, max_tokens: int, defaults: Mapping[str, Any] = MappingProxyType({})) -> SamplingParams:
        """Return how the engine draws.

        `defaults` replace fields that the request leaves out. A request without a seed gets a new one each time.
        """
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            seed=random.getrandbits(62) if self.seed is None else self.seed & INT64,
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            n=self.n,
            min_p=self.min_p,
            min_tokens=self.min_tokens,
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            logit_bias=self.logit_bias or None,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logprobs=self.num_logprobs,
            prompt_logprobs=self.num_prompt_logprobs,
            include_stop_str_in_output=self.include_stop_str_in_output,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
        )
        left_out = {name: value for name, value in defaults.items() if name not in self.model_fields_set}
        return replace(params, **left_out)

"""What clients send to /v1/completions and /v1/chat/completions, and what of it this server can do.

Three kinds of field: those of the models below are supported; those of a `NEUTRAL` table are known and not supported,
and refused unless their value changes nothing; all others are ignored, as clients add their own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from fastserve.core.logprobs import MOST_LOGPROBS
from fastserve.core.request import SamplingParams
from fastserve.server.errors import shown

MAX_PROMPTS = 1024
"""Prompts of one request. Each is a request of its own to the engine."""
MAX_MESSAGES = 4096
MAX_PARTS = 1024
"""Parts of one message's content."""
MAX_STOP_TEXTS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_CHOICES = 128
"""Outputs for one prompt; of all prompts together no more than MAX_PROMPTS."""
MAX_PROMPT_SCORES = 2**17
"""Log probabilities of prompts in one answer: of every prompt token itself, and of those that were likelier there."""
MAX_BIASED = 1024
MAX_ALLOWED = 16384
"""Token ids of `logit_bias` and of `allowed_token_ids`."""
MAX_NAME_CHARACTERS = 256
"""Of a role, or of the name of its speaker."""
_INT64 = 2**63 - 1
_INT32 = 2**31 - 1

Neutral = Mapping[str, tuple[Any, ...]]
"""Fields that are known and not supported, each with the values, beside null, that change nothing."""


def field_error(name: str, reason: str) -> PydanticCustomError:
    """What a validator of a whole object raises if the field `name` in it is at fault."""
    return PydanticCustomError("field", "{reason}", {"field": name, "reason": reason})


class Body(BaseModel):
    """An object of a request. Null is a field left out; fields of `NEUTRAL` are refused unless neutral."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True)
    NEUTRAL: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        given = {name: value for name, value in body.items() if value is not None}
        for name in cls.NEUTRAL.keys() & given.keys():
            neutral = cls.NEUTRAL[name]
            if given[name] not in neutral:
                instead = "leave it out" + "".join(f" or send {json.dumps(value)}" for value in neutral)
                raise field_error(name, f"{shown(given[name])} is not supported by this server; {instead}")
        return given


def _kind(**kinds: Callable[[Any], bool]) -> Callable[[Any], str | None]:
    """Chooses the kind of a value by looking at no more than its first element; tags are like `<text>`."""
    return lambda value: next((f"<{name}>" for name, is_kind in kinds.items() if is_kind(value)), None)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and isinstance(value[0], kind)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a lone surrogate at character {error.start}, which no text has") from error
    return text


def _few_biased(value: Any) -> Any:
    # Every wrong key and value of an object is an error, and its length is looked at after them.
    if isinstance(value, dict) and len(value) > MAX_BIASED:
        raise ValueError(f"at most {MAX_BIASED} tokens may have a bias, not {len(value)}")
    return value


Text = Annotated[str, AfterValidator(_encodable)]
Name = Annotated[str, Field(max_length=MAX_NAME_CHARACTERS), AfterValidator(_encodable)]
TokenId = Annotated[int, Field(ge=0, le=_INT32)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS), AfterValidator(_encodable)]
PromptField = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("<texts>")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("<lists>")]
    | Annotated[TokenIds, Tag("<ids>")],
    Discriminator(
        _kind(text=_is_text, texts=_is_list_of(str), lists=_is_list_of(list), ids=_is_list),
        custom_error_type="prompt",
        custom_error_message="Input should be a text, a list of token ids, or a list of either",
    ),
]
BiasField = Annotated[
    dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASED), BeforeValidator(_few_biased)
]
StopField = Annotated[
    Annotated[StopText, Tag("<text>")]
    | Annotated[list[StopText], Field(max_length=MAX_STOP_TEXTS, fail_fast=True), Tag("<texts>")],
    Discriminator(
        _kind(text=_is_text, texts=_is_list),
        custom_error_type="stop",
        custom_error_message="Input should be a text or a list of texts",
    ),
]


class StreamOptions(Body):
    """How a stream is sent."""

    include_usage: bool = False
    """Whether a last event without choices says how many tokens there were."""
    continuous_usage_stats: bool = False
    """Not OpenAI's: whether each event says how many there are until then, of its choice."""


class GenerationRequest(Body):
    """What both kinds of request have in common."""

    model: str | None = None
    """A name of GET /v1/models; left out, the one that is served."""
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=_INT32)
    """Not OpenAI's: the most likely tokens drawn from; 0 or -1 for all."""
    seed: int | None = Field(None, ge=-_INT64 - 1, le=_INT64)
    stop: StopField | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None = None
    """Not OpenAI's: tokens that end the output; they are part of it, without text."""
    ignore_eos: bool = False
    """Not OpenAI's: go on to `max_tokens` whatever is generated."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    """Not OpenAI's: `token_ids` beside every text."""
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    """Outputs for each prompt; with a seed, each draws with the next one."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: BiasField = {}
    """Token ids and what is added to their logits."""
    repetition_penalty: float = Field(1.0, gt=0, le=_INT32)
    """Not OpenAI's, as are those that follow; meanings are vLLM's."""
    min_p: float = Field(0.0, ge=0, le=1)
    min_tokens: int = Field(0, ge=0, le=_INT32)
    """Tokens before which neither the end of sequence nor a stop token is drawn, nor a stop text looked for."""
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED, fail_fast=True)] | None = (
        None
    )
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=_INT32)
    """Only so many tokens at the prompt's end are used; -1: as many as there is room for."""
    prompt_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    """Tell the log probability of every prompt token, and of so many of the likeliest at its place."""

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
        # What output is allowed.
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
        # Other servers' (SGLang, llama.cpp, OpenRouter).
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
        """Of each new token: how many of the likeliest are told with it; None: nothing is."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same of each prompt token."""
        return self.prompt_logprobs

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts that end the output and are not part of it."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling_params(self, max_tokens: int, defaults: Mapping[str, Any] = MappingProxyType({})) -> SamplingParams:
        """How the engine is to draw. `defaults` count for what the request does not say. Without a seed, another one
        each time."""
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            seed=random.getrandbits(62) if self.seed is None else self.seed & _INT64,
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
        unsaid = {name: value for name, value in defaults.items() if name not in self.model_fields_set}
        return replace(params, **unsaid)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: PromptField
    """One prompt or several, as text or token ids; each is a choice of the answer."""
    max_tokens: int = Field(16, ge=0, le=_INT32)
    """0 is for `echo`: the prompt alone."""
    echo: bool = False
    """Whether the text begins with the prompt, and its log probabilities, if asked for, with the prompt's."""
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    """Tell the log probability of every token, and of so many of the likeliest at its place."""

    NEUTRAL: ClassVar[Neutral] = {
        **GenerationRequest.NEUTRAL,
        "suffix": ("",),
        "prompt_embeds": (),
        "add_special_tokens": (True,),
    }

    @model_validator(mode="after")
    def _check_limit(self) -> CompletionRequest:
        if not self.max_tokens and not self.echo:
            raise field_error("max_tokens", "Input should be greater than or equal to 1, got 0; 0 is for echo: true")
        if len(self.prompts) * self.n > MAX_PROMPTS:
            reason = (
                f"{self.n} outputs for each of {len(self.prompts)} prompts are more than {MAX_PROMPTS}; ask for fewer"
            )
            raise field_error("n", reason)
        return self

    @property
    def num_logprobs(self) -> int | None:  # noqa: D102 (as above)
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:  # noqa: D102
        asked = [count for count in (self.prompt_logprobs, self.logprobs if self.echo else None) if count is not None]
        return max(asked, default=None)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Every prompt, as it came."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(Body):
    """A part of a message's content; text is the only kind there is."""

    type: Literal["text"]
    text: Text


ContentField = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<parts>")],
    Discriminator(
        _kind(text=_is_text, parts=_is_list),
        custom_error_type="content",
        custom_error_message="Input should be a text or a list of text parts",
    ),
]


class ChatMessage(Body):
    """One message of a conversation."""

    role: Name
    content: ContentField | None = None
    name: Name | None = None

    NEUTRAL: ClassVar[Neutral] = {
        "tool_calls": ([],),
        "tool_call_id": (),
        "function_call": (),
        "tools": ([],),
        "audio": (),
        "refusal": ("",),
        "reasoning": ("",),
        "reasoning_content": ("",),
    }

    def as_dict(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return {"role": self.role, "content": content or ""} | ({"name": self.name} if self.name else {})


OF_TEMPLATE: Neutral = {
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "tools": ([],),
}
"""Fields of a conversation that say how the chat template writes it."""


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1, le=_INT32)
    max_completion_tokens: int | None = Field(None, ge=1, le=_INT32)
    """The newer name of `max_tokens`. With neither, as many as the model's context and the cache allow."""
    logprobs: bool = False
    """Whether to tell the log probability of every token."""
    top_logprobs: int = Field(0, ge=0, le=MOST_LOGPROBS)
    """With `logprobs`: and of so many of the likeliest at its place."""

    NEUTRAL: ClassVar[Neutral] = {
        **GenerationRequest.NEUTRAL,
        # What the prompt is made of.
        "echo": (False,),
        "add_generation_prompt": (True,),
        "add_special_tokens": (False,),
        **OF_TEMPLATE,
        "reasoning_effort": (),
        "include_reasoning": (True,),
        # What output is allowed.
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "verbosity": ("medium",),
        "web_search_options": (),
        "moderation": (),
        "return_prompt_text": (False,),
    }

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise field_error("top_logprobs", "for logprobs: true only; leave it out")
        return self

    @property
    def num_logprobs(self) -> int | None:  # noqa: D102 (as above)
        return self.top_logprobs if self.logprobs else None

    @property
    def limit(self) -> str | None:
        """Which field bounds the output; None: neither is there."""
        names = ("max_completion_tokens", "max_tokens")
        return next((name for name in names if getattr(self, name) is not None), None)

"""What clients send to /v1/completions and /v1/chat/completions, and what of it this server can do.

A field we do not know is ignored, as clients add their own. One we know and cannot serve is refused, unless it has the
value that changes nothing: a client that asks for something must not be given something else.
"""

from __future__ import annotations

import random
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fastserve.request import SamplingParams
from fastserve.server.errors import bad_request

_INT64 = 2**63 - 1
_INT32 = 2**31 - 1


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a lone surrogate at character {error.start}, which no text has") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]
TokenId = Annotated[int, Field(ge=0, le=_INT32)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1)]


class StreamOptions(BaseModel):
    """How a stream is sent."""

    include_usage: bool = False
    """Whether a last event without choices says how many tokens there were."""


class GenerationRequest(BaseModel):
    """What both kinds of request have in common."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = None
    """A name of GET /v1/models; left out, the one that is served."""
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=_INT32)
    """Not OpenAI's: the most likely tokens drawn from; 0 or -1 for all."""
    seed: int | None = Field(None, ge=-_INT64 - 1, le=_INT64)
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stop_token_ids: list[TokenId] | None = None
    """Not OpenAI's: tokens that end the output; they are part of it, without text."""
    ignore_eos: bool = False
    """Not OpenAI's: go on to `max_tokens` whatever is generated."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    """Not OpenAI's: `token_ids` beside every text."""

    n: int | None = 1
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = 0
    frequency_penalty: float | None = 0
    repetition_penalty: float | None = 1
    min_tokens: int | None = 0

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "n": (1,),
        "logit_bias": ({},),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "repetition_penalty": (1,),
        "min_tokens": (0,),
    }
    """Values, beside null, of what is not supported that change nothing."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, body: Any) -> Any:
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body

    @model_validator(mode="after")
    def _check(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true only; leave it out")
        return self

    def require_supported(self) -> None:
        """Raise APIError 400 if it asks for what this server cannot do."""
        for name, neutral in self.NEUTRAL.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                shown = ", ".join(repr(one) for one in neutral)
                raise bad_request(
                    f"{name}={reprlib.repr(value)} is not supported by this server; leave it out or {shown}", name
                )

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts that end the output and are not part of it."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling_params(self, max_tokens: int) -> SamplingParams:
        """How the engine is to draw. Without a seed, another one each time."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            seed=random.getrandbits(62) if self.seed is None else self.seed & _INT64,
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(self.stop_token_ids or ()),
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: (
        Text | TokenIds | Annotated[list[Text], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]
    )
    """One prompt or several, as text or token ids; each is a choice of the answer."""
    max_tokens: int = Field(16, ge=1, le=_INT32)

    echo: bool | None = False
    best_of: int | None = 1
    suffix: str | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **GenerationRequest.NEUTRAL,
        "echo": (False,),
        "best_of": (1,),
        "suffix": ("",),
        "logprobs": (),
        "prompt_logprobs": (),
    }

    @property
    def prompts(self) -> list[str | list[int]]:
        """Every prompt, as it came."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(BaseModel):
    """A part of a message's content; text is the only kind there is."""

    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Text
    content: Text | list[TextPart] | None = None
    name: Text | None = None

    def as_dict(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return {"role": self.role, "content": content or ""} | ({"name": self.name} if self.name else {})


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=_INT32)
    max_completion_tokens: int | None = Field(None, ge=1, le=_INT32)
    """The newer name of `max_tokens`. With neither, as many as the model's context and the cache allow."""

    logprobs: bool | None = False
    top_logprobs: int | None = 0
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **GenerationRequest.NEUTRAL,
        "logprobs": (False,),
        "top_logprobs": (0,),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "response_format": ({"type": "text"},),
    }

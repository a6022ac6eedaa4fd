"""POST /v1/chat/completions, and the messages of a conversation."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from fastserve.core.logprobs import MOST_LOGPROBS
from fastserve.server.protocol.fields import (
    INT32,
    Body,
    Neutral,
    Text,
    encodable,
    field_error,
    is_list,
    is_text,
    kind_of,
)
from fastserve.server.protocol.generation import GenerationRequest

MAX_MESSAGES = 4096
MAX_PARTS = 1024
"""Parts of one message's content."""
MAX_NAME_CHARACTERS = 256
"""Of a role, or of a speaker's name."""

Name = Annotated[str, Field(max_length=MAX_NAME_CHARACTERS), AfterValidator(encodable)]


class TextPart(Body):
    """A part of a message's content; text is the only supported type."""

    type: Literal["text"]
    text: Text


ContentField = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<parts>")],
    Discriminator(
        kind_of(text=is_text, parts=is_list),
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
        """Return the message as chat templates take it."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return {"role": self.role, "content": content or ""} | ({"name": self.name} if self.name else {})


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]

TEMPLATE_FIELDS: Neutral = {
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "tools": ([],),
}
"""Unsupported fields that change how the chat template writes a conversation."""


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Messages
    max_tokens: int | None = Field(None, ge=1, le=INT32)
    max_completion_tokens: int | None = Field(None, ge=1, le=INT32)
    """The newer name of `max_tokens`. With neither, as many as the model's context and the cache allow."""
    logprobs: bool = False
    """Whether to return the log probability of every token."""
    top_logprobs: int = Field(0, ge=0, le=MOST_LOGPROBS)
    """With `logprobs`: of how many of the likeliest tokens at each position it is returned, too."""

    NEUTRAL: ClassVar[Neutral] = {
        **GenerationRequest.NEUTRAL,
        # How the prompt is made.
        "echo": (False,),
        "add_generation_prompt": (True,),
        "add_special_tokens": (False,),
        **TEMPLATE_FIELDS,
        "reasoning_effort": (),
        "include_reasoning": (True,),
        # The form of the output.
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
    def num_logprobs(self) -> int | None:  # noqa: D102 (inherited)
        return self.top_logprobs if self.logprobs else None

    @property
    def limit(self) -> str | None:
        """Name of the field that bounds the output; None: neither was sent."""
        names = ("max_completion_tokens", "max_tokens")
        return next((name for name in names if getattr(self, name) is not None), None)

"""POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Discriminator, Field, Tag, model_validator

from fastserve.core.logprobs import MOST_LOGPROBS
from fastserve.server.protocol.fields import (
    INT32,
    Neutral,
    Text,
    TokenIds,
    field_error,
    is_list,
    is_list_of,
    is_text,
    kind_of,
)
from fastserve.server.protocol.generation import GenerationRequest

MAX_PROMPTS = 1024
"""Prompts of one request, and outputs of all its prompts together. The engine takes each output as one request."""

PromptField = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("<texts>")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("<lists>")]
    | Annotated[TokenIds, Tag("<ids>")],
    Discriminator(
        kind_of(text=is_text, texts=is_list_of(str), lists=is_list_of(list), ids=is_list),
        custom_error_type="prompt",
        custom_error_message="Input should be a text, a list of token ids, or a list of either",
    ),
]


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: PromptField
    """One prompt or several, as text or token ids; each is a choice of the answer."""
    max_tokens: int = Field(16, ge=0, le=INT32)
    """0 is for `echo`: the prompt alone."""
    echo: bool = False
    """Whether the text begins with the prompt, and `logprobs`, if asked for, with those of the prompt."""
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    """Return the log probability of every token, and of so many of the likeliest tokens at its position."""

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
    def num_logprobs(self) -> int | None:  # noqa: D102 (inherited)
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:  # noqa: D102 (inherited)
        asked = [count for count in (self.prompt_logprobs, self.logprobs if self.echo else None) if count is not None]
        return max(asked, default=None)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Every prompt, as it was sent."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

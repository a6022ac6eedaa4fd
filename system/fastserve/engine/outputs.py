"""Outputs of the offline interface: what each prompt produced, from the engine's jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from fastserve.core.logprobs import TokenLogprobs
from fastserve.core.request import RequestStatus
from fastserve.engine.job import Job, RequestMetrics

Decode = Callable[[Sequence[int]], str | None]
"""Makes text of tokens; None without a tokenizer."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One output for a prompt."""

    index: int
    """Among the prompt's `SamplingParams.n`."""
    token_ids: list[int]
    """Generated tokens, without the prompt; empty if the request was rejected."""
    text: str | None
    """Decoded by the tokenizer; None without one."""
    logprobs: list[TokenLogprobs] | None
    """Of each generated token, if `SamplingParams.logprobs` asks for it."""
    error: str
    """Why the request was rejected or failed; empty otherwise."""
    metrics: RequestMetrics


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The `outputs` for one prompt. The fields of the first output are here too."""

    request_id: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    """Generated tokens, without the prompt; empty if the request was rejected."""
    text: str | None
    """Decoded by the tokenizer; None without one."""
    error: str
    """Why the request was rejected or failed; empty otherwise."""
    metrics: RequestMetrics
    outputs: list[CompletionOutput]
    """`SamplingParams.n` of them, each a request of its own to the engine."""
    prompt_logprobs: list[TokenLogprobs | None] | None
    """Of each prompt token, None for the first, if `SamplingParams.prompt_logprobs` asks for it."""


def request_outputs(jobs: Iterable[Job], numbers: Iterable[int], decode: Decode) -> list[RequestOutput]:
    """Return the outputs of consecutive jobs, of which each prompt has the number given."""
    remaining = iter(jobs)
    groups = (list(islice(remaining, number)) for number in numbers)
    return [_request_output(group, decode) for group in groups if group]


def _request_output(jobs: Sequence[Job], decode: Decode) -> RequestOutput:
    outputs = [_completion_output(index, job, decode) for index, job in enumerate(jobs)]
    first, request, known = outputs[0], jobs[0].request, jobs[0].logprobs
    asked = jobs[0].params.prompt_logprobs is not None
    return RequestOutput(
        request.request_id.removesuffix("-0"),
        request.token_ids[: request.num_prompt_tokens],
        first.token_ids,
        first.text,
        first.error,
        first.metrics,
        outputs,
        [None, *known.prompt] if asked and known is not None else None,
    )


def _completion_output(index: int, job: Job, decode: Decode) -> CompletionOutput:
    request, params, known = job.request, job.params, job.logprobs
    generated = request.token_ids[request.num_prompt_tokens :]
    shown = generated
    if request.status is RequestStatus.FINISHED and generated[-1] in job.stop_token_ids:
        shown = generated if params.include_stop_str_in_output else generated[:-1]
    return CompletionOutput(
        index,
        generated,
        decode(shown),
        known.tokens if params.logprobs is not None and known is not None else None,
        job.error,
        job.metrics,
    )

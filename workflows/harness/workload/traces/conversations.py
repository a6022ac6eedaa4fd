"""Formats whose files hold text: the prompt and the answer of each record, whose tokens are counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastserve.core.errors import TraceError
from harness.workload.traces.lengths import ARTIFACT_FILTER, RecordedLengths
from harness.workload.traces.rows import member, opened, shown
from harness.workload.traces.text import TokenCounter

_SYSTEM, _USERS, _ASSISTANTS = "system", ("human", "user"), ("gpt", "assistant", "chatgpt")
"""Speakers of a turn, by the names that files use."""


def read_sharegpt(path: str, counter: TokenCounter) -> RecordedLengths:
    """Read ShareGPT: the first question of each conversation and its answer. A system prompt is part of the question.

    Turns are `from` and `value`, or `role` and `content`, in a list `conversations` or `messages`.
    """
    prompts, outputs = [], []
    records = _json_records(path)
    for where, record in records:
        field = (
            "messages"
            if isinstance(record, dict) and "conversations" not in record and "messages" in record
            else ("conversations")
        )
        turns = member(where, record, field)
        if not isinstance(turns, list):
            raise TraceError(f"{where}: {field} must be a list of turns, not {shown(turns)}")
        first = [_turn(where, turn) for turn in turns[:3]]
        system = [text for speaker, text in first[:1] if speaker == _SYSTEM]
        exchange = first[len(system) :][:2]
        if len(exchange) == 2 and exchange[0][0] in _USERS and exchange[1][0] in _ASSISTANTS:
            prompts.append("\n".join([*system, exchange[0][1]]))
            outputs.append(exchange[1][1])
    return _counted("sharegpt", path, len(records), prompts, outputs, counter)


def read_alpaca(path: str, counter: TokenCounter) -> RecordedLengths:
    """Read Alpaca: the prompt is the instruction and, on the next line, the input if there is one."""
    prompts, outputs = [], []
    records = _json_records(path)
    for where, record in records:
        parts = _text(where, record, "instruction"), _text(where, record, "input")
        prompts.append("\n".join(filter(None, parts)))
        outputs.append(_text(where, record, "output"))
    return _counted("alpaca", path, len(records), prompts, outputs, counter)


def _counted(
    kind: str, path: str, records: int, prompts: list[str], outputs: list[str], counter: TokenCounter
) -> RecordedLengths:
    prompt, output = counter.count(prompts), counter.count(outputs)
    kept = ARTIFACT_FILTER.keeps(prompt, output)
    if not kept.any():
        raise TraceError(
            f"{path}: none of its {records} records is a prompt with an answer that passes the artifact's filter "
            f"({ARTIFACT_FILTER.rule})"
        )
    description = f"{kind}:{path}: {kept.sum()} of {records} records after the artifact's filter; {counter.description}"
    return RecordedLengths(description, prompt[kept], output[kept])


def _json_records(path: str) -> list[tuple[str, Any]]:
    with opened(path) as file:
        try:
            records = json.load(file)
        except json.JSONDecodeError as error:
            raise TraceError(
                f"{path}, line {error.lineno}: not JSON: {error.msg}; expected a list of records"
            ) from error
        except RecursionError as error:
            raise TraceError(f"{path}: JSON nested too deeply to be read; expected a list of records") from error
    if not isinstance(records, list) or not records:
        raise TraceError(f"{path}: expected a JSON list of at least one record, found {shown(records)}")
    return [(f"{path}, record {index} (from 0)", record) for index, record in enumerate(records)]


def _turn(where: str, turn: object) -> tuple[str, str]:
    """The speaker and the text of a turn."""
    names = (
        ("role", "content") if isinstance(turn, dict) and "from" not in turn and "role" in turn else ("from", "value")
    )
    speaker, text = (_text(where, turn, name) for name in names)
    return speaker, text


def _text(where: str, record: object, field: str) -> str:
    value = member(where, record, field)
    if not isinstance(value, str):
        raise TraceError(f"{where}: {field} must be a text, not {shown(value)}")
    return value


@dataclass(frozen=True)
class TextFormat:
    """A format whose files hold text."""

    description: str
    read: Callable[[str, TokenCounter], RecordedLengths]


TEXT_FORMATS = {
    "sharegpt": TextFormat(
        "ShareGPT JSON, first question and answer; add ,tokenizer=DIR to count real tokens", read_sharegpt
    ),
    "alpaca": TextFormat("Alpaca JSON; add ,tokenizer=DIR to count real tokens", read_alpaca),
}
"""By kind, in the order they are listed."""

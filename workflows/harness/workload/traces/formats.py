"""Formats whose files hold token counts: their fields, how they write time, and how they are told apart."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import NamedTuple

from fastserve.core.errors import TraceError
from harness.workload.traces.rows import (
    csv_rows,
    json_rows,
    listed,
    member,
    read_date,
    read_time,
    read_tokens,
    read_whole_time,
)


class Clock(Enum):
    """How a format writes the time of a request; the value is the name of the unit."""

    DATE = "dates"
    SECONDS = "seconds"
    MILLISECONDS = "milliseconds"


class Row(NamedTuple):
    """A request of a file: its place in the file, its lengths in tokens, its arrival on the file's own time axis."""

    where: str
    prompt: int
    output: int
    arrival_s: float | None


@dataclass(frozen=True)
class LengthFormat:
    """A format, and how it is recognised."""

    kind: str
    description: str
    is_json: bool
    """Whether files are JSON lines; else they are CSV with a header."""
    prompt: str
    output: str
    time: str
    clock: Clock
    is_time_optional: bool = False
    mark: str | None = None
    """A further field that every request of this format has."""
    foreign: Mapping[str, str] = field(default_factory=dict)
    """Fields that this format never has, and the kind of file that has them."""
    zero_output: str = ""
    """What 0 output tokens mean, and what to do about them; the end of an error."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that a file must have."""
        time = () if self.is_time_optional else (self.time,)
        return (*time, self.prompt, self.output, *((self.mark,) if self.mark else ()))

    def rows(self, path: str) -> Iterator[Row]:
        """Read a file row by row. This is slow, but names the line of an error; it defines what is well-formed."""
        start = None
        records = json_rows(path) if self.is_json else csv_rows(path, partial(self.check_header, path))
        for where, record in records:
            if self.is_json:
                self._check_fields(where, path, record)
            is_timed = self.time in record
            arrival_s = None
            if is_timed and self.clock is Clock.DATE:
                moment, fraction = read_date(where, self.time, record[self.time])
                start = start or moment
                arrival_s = (moment - start).total_seconds() + fraction
            elif is_timed and self.clock is Clock.MILLISECONDS:
                remedy = "files with seconds are read as bailian:PATH or csv:PATH"
                arrival_s = read_whole_time(where, self.time, record[self.time], self.clock.value, remedy) / 1000
            elif is_timed:
                arrival_s = read_time(where, self.time, record[self.time], self.clock.value)
            prompt = read_tokens(where, self.prompt, record[self.prompt])
            if self.zero_output and str(record[self.output]).strip() == "0":
                raise TraceError(f"{where}: 0 {self.output} {self.zero_output}")
            output = read_tokens(where, self.output, record[self.output])
            yield Row(where, prompt, output, arrival_s)

    def check_header(self, path: str, found: Sequence[str]) -> None:
        """Raise TraceError if a CSV file lacks a column; name the kind that has the columns found."""
        missing = [name for name in self.fields if name not in found]
        if missing:
            names = f"found {listed(found)}{_hint(found)}" if found else "the file is empty"
            raise TraceError(
                f"{path}, line 1: no column {', '.join(missing)}; expected {', '.join(self.fields)}, {names}"
            )

    def _check_fields(self, where: str, path: str, record: object) -> None:
        try:
            for name in self.fields:
                member(where, record, name)
        except TraceError as error:
            hint = _hint(record) if isinstance(record, dict) else ""
            raise TraceError(f"{error}{hint}") from error
        assert isinstance(record, dict)
        for name, kind in self.foreign.items():
            if name in record:
                raise TraceError(
                    f"{where}: {name!r} belongs to {kind} files, whose {self.time} is in "
                    f"{FORMATS[kind].clock.value}, not {self.clock.value}; read it as {kind}:{path}"
                )


def _hint(fields: Collection[str]) -> str:
    """Name the format that has these fields, if there is one."""
    for other in FORMATS.values():
        if set(other.fields) <= set(fields) and not other.foreign.keys() & set(fields):
            return f"; a file with these is read as {other.kind}:PATH"
    return ""


FORMATS = {
    each.kind: each
    for each in (
        LengthFormat(
            "azure",
            "Azure LLM inference trace CSV, with timestamps",
            is_json=False,
            prompt="ContextTokens",
            output="GeneratedTokens",
            time="TIMESTAMP",
            clock=Clock.DATE,
        ),
        LengthFormat(
            "burstgpt",
            "BurstGPT CSV, with timestamps in seconds",
            is_json=False,
            prompt="Request tokens",
            output="Response tokens",
            time="Timestamp",
            clock=Clock.SECONDS,
            zero_output=(
                "marks a request that failed; expected successes only: "
                "use the data set's BurstGPT_without_fails files, or remove such lines"
            ),
        ),
        LengthFormat(
            "mooncake",
            "Mooncake JSONL, with timestamps in whole milliseconds",
            is_json=True,
            prompt="input_length",
            output="output_length",
            time="timestamp",
            clock=Clock.MILLISECONDS,
            foreign={"chat_id": "bailian"},
        ),
        LengthFormat(
            "bailian",
            "Alibaba Bailian (Qwen) usage trace JSONL, with timestamps in seconds",
            is_json=True,
            prompt="input_length",
            output="output_length",
            time="timestamp",
            clock=Clock.SECONDS,
            mark="chat_id",
        ),
        LengthFormat(
            "csv",
            "CSV with prompt_tokens, output_tokens and optionally arrival_s in seconds",
            is_json=False,
            prompt="prompt_tokens",
            output="output_tokens",
            time="arrival_s",
            clock=Clock.SECONDS,
            is_time_optional=True,
        ),
    )
}
"""By kind, in the order they are listed."""

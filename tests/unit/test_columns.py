"""Files read at once hold what they hold row by row, and the same faults are named."""

import json
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.core.errors import TraceError
from harness.workload.traces import load_trace, reading
from harness.workload.traces.columns import read_columns
from harness.workload.traces.formats import FORMATS
from harness.workload.traces.reading import files_read, read_lengths, read_rows, take_over

TOKENS = [
    "1",
    "7",
    "4096",
    "2147483647",
    "2147483648",
    "0",
    "-3",
    "5.0",
    "1_0",
    " 8 ",
    "",
    "0x1f",
    "+2",
    "007",
    "9" * 12,
    "x",
]
TIMES = ["0", "3", "-1", "2.5", "1e3", " 4", "5.", ".5", "nan", "inf", "", "1_0", "1e999", "61.114", "x", "007"]
DATES = [
    "2023-11-16 18:15:46.6805900", "2023-11-16 18:15:46", "2024-05-10 00:00:00.009930+00:00", "2023-11-16 18:15:46.",
    "2023-1-6 18:15:46.5", "2023-02-30 00:00:00", "2023-11-16 18:15:60.1", "2023-11-16T18:15:46",
    " 2023-11-17 00:00:00 ",
    "2023-11-16 18:15:46.12345678901234567890", "2023-11-16 18:15:4612", "x", "",
]  # fmt: skip
JSON_TOKENS = ["1", "4096", "2147483648", "0", "-3", "5.0", "1e2", "true", "null", '"7"', "[1]"]
JSON_TIMES = ["0", "3", "3.0", "2.5", "-1", "1e3", "1e999", "null", "true", '"4"', "[1]", "NaN"]


def same(kind: str, path, first=None) -> None:
    """Read at once, a file is as it is row by row, or it is left to that."""
    try:
        columns = read_columns(FORMATS[kind], str(path), first)
    except TraceError as error:
        with pytest.raises(TraceError, match=re.escape(str(error))):
            read_rows(FORMATS[kind], str(path), first)
        return
    if columns is None:
        return
    for at_once, by_row in zip(columns, read_rows(FORMATS[kind], str(path), first), strict=True):
        if by_row is None:
            assert at_once is None
        else:
            np.testing.assert_array_equal(at_once, by_row)
            assert at_once.dtype == by_row.dtype


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A file that is written again and again."""
    return tmp_path_factory.mktemp("scratch") / "x"


def field(usual: list[str], unusual: list[str]) -> st.SearchStrategy[str]:
    """Mostly as it should be, so that whole files are well-formed often enough."""
    return st.one_of(*[st.sampled_from(usual)] * 12, st.sampled_from(unusual))


@settings(deadline=None, max_examples=100)
@given(data=st.data(), kind=st.sampled_from(["azure", "burstgpt", "csv"]), first=st.sampled_from([None, 1, 2, 5]))
def test_csv_is_the_same_at_once_and_row_by_row(data, kind, first, scratch) -> None:
    format_ = FORMATS[kind]
    times = field(DATES[:3], DATES) if kind == "azure" else field(["0", "2.5", "61.114", "007"], TIMES)
    rows = st.tuples(times, field(TOKENS[:3], TOKENS), field(TOKENS[:3], TOKENS))
    lines = data.draw(st.lists(rows.map(",".join) | st.sampled_from(["", '"3","4","5"', "1,2"]), max_size=6))
    names = [format_.time, format_.prompt, format_.output]
    bom, end = data.draw(st.sampled_from(["", "\ufeff"])), data.draw(st.sampled_from(["\n", "\r\n"]))
    scratch.write_bytes((bom + end.join([",".join(names), *lines]) + data.draw(st.sampled_from(["", end]))).encode())
    same(kind, scratch, first)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), kind=st.sampled_from(["mooncake", "bailian"]), first=st.sampled_from([None, 1, 2, 5]))
def test_json_is_the_same_at_once_and_row_by_row(data, kind, first, scratch) -> None:
    usual = ["0", "3", "3.0"] if kind == "mooncake" else ["0", "2.5", "61.114"]
    rows = st.tuples(field(usual, JSON_TIMES), field(JSON_TOKENS[:2], JSON_TOKENS), field(JSON_TOKENS[:2], JSON_TOKENS))
    mark = st.sampled_from(['"chat_id": 1, '] * 9 + [""] if kind == "bailian" else [""] * 9 + ['"chat_id": 1, '])
    text = '{{{}"timestamp": {}, "input_length": {}, "output_length": {}, "hash_ids": [1, 2]}}'
    line = st.tuples(mark, rows).map(lambda drawn: text.format(drawn[0], *drawn[1]))
    lines = data.draw(st.lists(line | st.sampled_from(["", "{}", "[1]", "{", "7"]), max_size=6))
    scratch.write_text("\n".join(lines) + data.draw(st.sampled_from(["", "\n"])))
    same(kind, scratch, first)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_usual_is_read_at_once(kind, tmp_path) -> None:
    path = tmp_path / "x"
    format_ = FORMATS[kind]
    if format_.is_json:
        time_ = 3 if kind == "mooncake" else 61.114
        row = {"timestamp": time_, "input_length": 3, "output_length": 2, "hash_ids": list(range(9000))}
        row |= {format_.mark: 1} if format_.mark else {}
        path.write_text(f"{json.dumps(row)}\n" * 500)
    else:
        time_ = "2023-11-16 18:15:46.6805900" if kind == "azure" else "3.5"
        path.write_text(
            f"Log Type,{format_.prompt},{format_.output},{format_.time}\n" + f'"API, log",3,2,{time_}\n' * 500
        )
    for first in (None, 20, 900):
        columns = read_columns(format_, str(path), first)
        assert columns is not None
        assert len(columns.prompt) == min(first or 500, 500)
        same(kind, path, first)


@pytest.mark.parametrize("first", [None, 1])
@pytest.mark.parametrize(
    "text",
    [
        2 * '{"timestamp": 0, "input_length": 3, "output_length": 1}',
        '{"timestamp": 0,\n"input_length": 3, "output_length": 1}\n',
        '{"timestamp": 0, "timestamp": 5, "input_length": 3, "output_length": 1}\n',
        '\ufeff{"timestamp": 0, "input_length": 3, "output_length": 1, "x": 1}\r\n\r\n'
        '{"timestamp": 1, "input_length": 3, "output_length": 1, "x": "a"}\r\n',
    ],
)
def test_json_on_other_lines_than_one_each_is_the_same(text: str, first: int | None, scratch) -> None:
    scratch.write_text(text)
    same("mooncake", scratch, first)


@pytest.mark.parametrize("first", [None, 1, 2])
@pytest.mark.parametrize(
    "text",
    [
        'a,prompt_tokens,output_tokens\n"x\ny",3,4\nz,5,6\n',
        'a,prompt_tokens,output_tokens\n"x,y",3,4\n"z""z",5,6\n',
        'a,prompt_tokens,output_tokens\nx"y,3,4\nz"z,5,6\n',
        'a,prompt_tokens,output_tokens\n"x"y,3,4\nz,5,6\n',
        'a,prompt_tokens,output_tokens\n"x,3,4\nz,5,6\n',
        'a,prompt_tokens,output_tokens\nx,3,4\n"z,5,6',
        'a,prompt_tokens,output_tokens\nx,"3",4\nz,"5\n",6\n',
        "a,prompt_tokens,output_tokens,\nx,3,4,\nz,5,6\n",
        "a,a,prompt_tokens,output_tokens\nx,y,3,4\nz,z,5,6\n",
        '"prompt_tokens", output_tokens\n3, 4\n5,6\n   \n',
        "prompt_tokens,output_tokens\n3,4\n\n\n5,6\n",
        "prompt_tokens,output_tokens\r3,4\r5,6\r",
        '"a\nb",prompt_tokens,output_tokens\nx,3,4\nz,5,6\n',
        "prompt_tokens,output_tokens\n3,4\n5\x00,6\n",
        "\nprompt_tokens,output_tokens\n3,4\n",
    ],
)
def test_csv_with_quotes_and_gaps_is_the_same(text: str, first: int | None, scratch) -> None:
    scratch.write_text(text, newline="")
    same("csv", scratch, first)


def test_the_first_requests_are_enough(tmp_path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("prompt_tokens,output_tokens,arrival_s\n5,6,0\n\n7,8,1\nmalformed\n")
    for first in (1, 2):  # Of which an empty line is none.
        assert read_lengths(FORMATS["csv"], str(path), first).prompt_tokens.tolist() == [5, 7][:first]
    with pytest.raises(TraceError, match="line 5"):
        read_lengths(FORMATS["csv"], str(path), 3)
    with pytest.raises(TraceError, match="line 5"):
        load_trace(f"csv:{path}")


def test_a_malformed_line_among_many_is_named(tmp_path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("prompt_tokens,output_tokens,arrival_s\n" + "5,6,0\n" * 50_000 + "5,zero,0\n" + "5,6,0\n" * 50_000)
    with pytest.raises(TraceError, match=r"x\.csv, line 50002: output_tokens must be a positive integer, not 'zero'"):
        load_trace(f"csv:{path}")


def test_a_pipe_is_read_too(tmp_path) -> None:
    import os
    import threading

    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=("prompt_tokens,output_tokens\n5,6\n7,8\n",))
    writer.start()
    assert load_trace(f"csv:{path}").prompt_tokens.tolist() == [5, 7]
    writer.join()


def test_a_process_reads_a_file_once_unless_it_changes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(reading, "_read", {})
    path = tmp_path / "x.csv"
    path.write_text("prompt_tokens,output_tokens\n5,6\n")
    first = load_trace(f"csv:{path}")
    assert load_trace(f"csv:{path}") is first
    assert load_trace(f"csv:{path}", first=1) is not first
    carried = files_read()
    monkeypatch.setattr(reading, "_read", {})
    take_over(carried)
    assert load_trace(f"csv:{path}") is first
    time.sleep(0.02)
    path.write_text("prompt_tokens,output_tokens\n7,6\n")
    assert load_trace(f"csv:{path}").prompt_tokens.tolist() == [7]
    for i in range(20):  # It does not hold every file for ever.
        (tmp_path / f"{i}.csv").write_text("prompt_tokens,output_tokens\n7,6\n")
        load_trace(f"csv:{tmp_path / f'{i}.csv'}")
    assert len(files_read()) == 8


def test_texts_are_counted_once_for_each_tokenizer(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(reading, "_read", {})
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"instruction": "abcd" * 9, "input": "", "output": "abcd" * 5}]))
    first = load_trace(f"alpaca:{path}")
    assert load_trace(f"alpaca:{path}") is first
    assert len(files_read()) == 1

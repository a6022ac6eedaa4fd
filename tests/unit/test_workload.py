import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.errors import ConfigError, TraceError
from harness.workload.arrivals import Arrivals
from harness.workload.traces import load_trace
from harness.workload.traces.formats import FORMATS
from harness.workload.workload import make_workload

TRACES_FOLDER = Path(__file__).parents[2] / "traces"
CSV = f"csv:{TRACES_FOLDER / 'fixtures' / 'lengths.csv'}"
TRACES = ["sharegpt", "alpaca", "azure-conv", "zipf", "fixed", CSV]
ARRIVALS = ["poisson", "gamma:cv=4", "constant"]


@given(
    trace=st.sampled_from(TRACES),
    arrivals=st.sampled_from(ARRIVALS),
    rate=st.floats(0.01, 100),
    n=st.integers(1, 60),
    seed=st.integers(0, 2**64),
)
def test_same_specification_same_bytes(trace, arrivals, rate, n, seed):
    first, second = (make_workload(trace, arrivals, rate, n, seed) for _ in range(2))
    assert len(first) == n
    assert first.digest == second.digest
    assert first.description == second.description
    assert first.prompt_token_ids(n - 1, 1000) == second.prompt_token_ids(n - 1, 1000)


@pytest.mark.parametrize("trace", [trace for trace in TRACES if trace != "fixed"])
def test_seeds_differ_in_lengths_gaps_and_tokens(trace):
    one, two = make_workload(trace, "poisson", 1.0, 50, 1), make_workload(trace, "poisson", 1.0, 50, 2)
    assert one.digest != two.digest
    assert one.prompt_tokens.tolist() != two.prompt_tokens.tolist()
    assert one.arrival_s.tolist() != two.arrival_s.tolist()
    assert one.prompt_token_ids(0, 50_000)[:4] != two.prompt_token_ids(0, 50_000)[:4]


def test_lengths_do_not_depend_on_rate_or_arrivals_and_gaps_only_scale():
    slow, fast = (make_workload("sharegpt", "gamma:cv=2", rate, 100, 7) for rate in (0.5, 5.0))
    other = make_workload("sharegpt", "constant", 1.0, 100, 7)
    for workload in (fast, other):
        np.testing.assert_array_equal(slow.prompt_tokens, workload.prompt_tokens)
        np.testing.assert_array_equal(slow.output_tokens, workload.output_tokens)
    np.testing.assert_allclose(slow.arrival_s, fast.arrival_s * 10, rtol=1e-12)


def test_gaps_do_not_depend_on_the_trace():
    one, two = make_workload("fixed", "poisson", 1.0, 20, 3), make_workload("azure-conv", "poisson", 1.0, 20, 3)
    np.testing.assert_array_equal(one.arrival_s, two.arrival_s)


def test_more_requests_extend_the_workload():
    short, long = make_workload("azure-conv", "poisson", 1.0, 20, 3), make_workload("azure-conv", "poisson", 1.0, 99, 3)
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(getattr(short, name), getattr(long, name)[:20])
    assert short.prompt_token_ids(4, 100) == long.prompt_token_ids(4, 100)


def test_file_is_sampled_with_replacement_in_pairs():
    workload = make_workload(CSV, "poisson", 1.0, 2000, 0)
    pairs = set(zip(workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True))
    assert pairs == {(100, 20), (200, 10), (50, 400), (800, 60)}


def test_trace_arrivals_keep_the_file_order():
    workload = make_workload(CSV, "trace", None, 3, 0)
    assert workload.arrival_s.tolist() == [0, 0.5, 2]
    assert workload.prompt_tokens.tolist() == [100, 200, 50]
    assert workload.output_tokens.tolist() == [20, 10, 400]
    assert "the trace's own rate" in workload.description
    assert make_workload(CSV, "trace", 1.0, 3, 0).arrival_s.tolist() == [0, 0.5, 2]
    assert make_workload(CSV, "trace", 2.0, 3, 0).arrival_s.tolist() == [0, 0.25, 1]


@pytest.mark.parametrize("trace", ["sharegpt", "fixed", f"alpaca:{TRACES_FOLDER / 'fixtures' / 'alpaca.json'}"])
def test_trace_arrivals_need_timestamps(trace):
    with pytest.raises(TraceError) as caught:
        make_workload(trace, "trace", None, 2, 0)
    assert f"trace {trace!r} has no timestamps" in str(caught.value)


def test_trace_arrivals_need_enough_requests():
    with pytest.raises(TraceError, match="holds 4 requests, fewer than the 5"):
        make_workload(CSV, "trace", None, 5, 0)


def test_an_unsorted_file_matters_only_where_its_times_are_replayed(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("prompt_tokens,output_tokens,arrival_s\n5,6,1\n5,6,2\n\n5,6,1.5\n5,6,9\n")
    assert len(make_workload(f"csv:{path}", "poisson", 1.0, 20, 0)) == 20
    assert make_workload(f"csv:{path}", "trace", None, 2, 0).arrival_s.tolist() == [0, 1]
    with pytest.raises(TraceError, match=r"x\.csv, line 5: it arrives 0\.5 s before the request above it"):
        make_workload(f"csv:{path}", "trace", None, 4, 0)
    with pytest.raises(TraceError, match="it arrives"):
        make_workload(load_trace(f"csv:{path}"), "trace", None, 4, 0)


def trace_at(folder, kind, rate, num_requests=40, prompt=100):
    """A trace of that rate in requests per unit of the format."""
    times = [i / rate for i in range(num_requests)]
    path = folder / "trace"
    if FORMATS[kind].is_json:
        rows = ({"timestamp": at, "input_length": prompt, "output_length": 9, "chat_id": 1} for at in times)
        if kind == "mooncake":
            rows = ({**row, "timestamp": round(row["timestamp"])} for row in rows)
            rows = ({name: value for name, value in row.items() if name != "chat_id"} for row in rows)
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif kind == "azure":
        start = np.datetime64("2023-11-16T18:15:46.000000")
        moments = (str(start + np.timedelta64(round(at * 1e6), "us")).replace("T", " ") for at in times)
        path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"{at},{prompt},9\n" for at in moments))
    else:
        names = [FORMATS[kind].time, FORMATS[kind].prompt, FORMATS[kind].output]
        path.write_text(f"{','.join(names)}\n" + "".join(f"{at},{prompt},9\n" for at in times))
    return f"{kind}:{path}"


@pytest.mark.parametrize(
    ("kind", "rate", "question"),
    [
        ("bailian", 0.53, None),
        ("mooncake", 0.53, "a second, where published traces have 0.3 to 50; its timestamps are read as "
         "milliseconds; are they seconds?"),
        ("mooncake", 0.0066, None),
        ("bailian", 0.00053, "its timestamps are read as seconds; are they milliseconds?"),
        ("csv", 0.0054, "its timestamps are read as seconds; are they milliseconds?"),
        ("csv", 300, "its timestamps are read as seconds; are they minutes?"),
        ("burstgpt", 0.27, None),
        ("burstgpt", 0.00027, "its timestamps are read as seconds; are they milliseconds?"),
        ("azure", 5.4, None),
        ("azure", 5400, "5.4e+03 a second, where published traces have 0.3 to 50; is that meant?"),
    ],
)  # fmt: skip
def test_an_implausible_rate_is_questioned_where_the_trace_sets_the_pace(kind, rate, question, tmp_path):
    trace = trace_at(tmp_path, kind, rate)
    asked = make_workload(trace, "trace", None, 40, 0).questions
    assert len(asked) == bool(question)
    assert question is None or (question in asked[0] and asked[0].startswith(f"trace {trace!r}: 40 requests"))
    assert not make_workload(trace, "trace", 2.0, 40, 0).questions
    assert not make_workload(trace, "poisson", 2.0, 40, 0).questions


def test_implausible_lengths_are_questioned_whatever_the_arrivals(tmp_path):
    trace = trace_at(tmp_path, "csv", 2.0, prompt=2_000_000)
    for arrivals in ("trace", "poisson"):
        (asked,) = make_workload(trace, arrivals, 2.0, 20, 0).questions
        assert "the mean prompt has 2e+06 tokens; are its lengths in characters or bytes, not in tokens?" in asked


def test_requests_at_one_instant_are_questioned(tmp_path):
    (asked,) = make_workload(trace_at(tmp_path, "csv", float("inf")), "trace", None, 40, 0).questions
    assert "40 requests arrive within 0 s, inf a second" in asked


@pytest.mark.parametrize(
    ("rate", "n", "seed", "message"),
    [
        (0.0, 5, 0, "not 0.0"),
        (float("nan"), 5, 0, "not nan"),
        (None, 5, 0, "need a rate"),
        (1.0, 0, 0, "num_requests must be at least 1, not 0"),
        (1.0, 5, -1, "seed must be at least 0, not -1"),
    ],
)
def test_values_out_of_range(rate, n, seed, message):
    with pytest.raises(ConfigError, match=message):
        make_workload("fixed", "poisson", rate, n, seed)


def test_a_loaded_trace_gives_the_same_workload_as_its_specification():
    loaded = make_workload(load_trace(CSV), Arrivals("poisson"), 1.0, 10, 0)
    assert loaded.digest == make_workload(CSV, "poisson", 1.0, 10, 0).digest


def test_replaying_a_loaded_trace_leaves_it_usable():
    source = load_trace(CSV)
    assert make_workload(source, "trace", None, 4, 0).digest == make_workload(source, "trace", None, 4, 0).digest
    with pytest.raises(ValueError, match="read-only"):  # A process reads a file once: what it holds must stay.
        source.prompt_tokens[0] = 1


def test_digest_covers_every_array():
    base = make_workload("fixed", "constant", 1.0, 3, 0)
    others = [
        make_workload("fixed", "constant", 2.0, 3, 0),
        make_workload("fixed:prompt=127", "constant", 1.0, 3, 0),
        make_workload("fixed:output=63", "constant", 1.0, 3, 0),
        make_workload("fixed", "constant", 1.0, 2, 0),
    ]
    assert len({workload.digest for workload in (base, *others)}) == 5
    assert len(base.digest) == 64


def test_arrays_are_read_only():
    workload = make_workload("fixed", "constant", 1.0, 3, 0)
    for array in (workload.arrival_s, workload.prompt_tokens, workload.output_tokens):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_prompt_token_ids():
    workload = make_workload("sharegpt", "poisson", 1.0, 5, 0)
    for i in range(5):
        ids = workload.prompt_token_ids(i, 50)
        assert len(ids) == workload.prompt_tokens[i]
        assert all(type(token) is int and 0 <= token < 50 for token in ids)
    assert workload.prompt_token_ids(-1, 50) == workload.prompt_token_ids(4, 50)
    assert workload.prompt_token_ids(0, 50_000)[:4] != workload.prompt_token_ids(1, 50_000)[:4]
    with pytest.raises(IndexError):
        workload.prompt_token_ids(5, 50)
    with pytest.raises(ConfigError, match="not 0"):
        workload.prompt_token_ids(0, 0)


def test_import_is_light():
    heavy = ("torch", "pandas", "transformers", "pyarrow")
    code = f"import sys, harness.workload.workload; print([m for m in {heavy} if m in sys.modules])"
    folders = os.pathsep.join(str(TRACES_FOLDER.parent / folder) for folder in ("system", "workflows"))
    environment = {**os.environ, "PYTHONPATH": folders}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout.strip() == "[]"

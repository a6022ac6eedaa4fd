"""`sharegpt-opt` and `sharegpt-client`: the published means, the derived share, the filters, the sampler."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.core.errors import ConfigError
from harness.workload.traces import ARTIFACT_FILTER, CLIENT_FILTER, length_statistics, load_trace
from harness.workload.traces.joint import JointLengths, filtered
from harness.workload.traces.lengths import LengthFilter
from harness.workload.traces.sharegpt import CLIENT_MEANS, CLIENT_SHARE, FITTED_SHARE, client_lengths, client_share

ROOT = Path(__file__).parents[2]


def statistics(spec):
    return load_trace(spec).statistics()


def test_first_turns_have_the_means_of_vllms_paper():
    means = statistics("sharegpt-opt")
    assert (means["mean_prompt"], means["mean_output"]) == pytest.approx((161.3, 338.0), rel=0.002)


def test_the_shipped_share_is_the_one_that_the_clients_means_give():
    assert round(client_share(), 2) == CLIENT_SHARE
    means = client_lengths(client_share(), "or").statistics()
    assert (means["mean_prompt"], means["mean_output"]) == pytest.approx(CLIENT_MEANS, rel=0.01)


def test_the_clients_filter_gives_226_and_196_and_a_mean_of_1_over_output_of_0_0375():
    found = statistics("sharegpt-client:filter=or")
    assert (found["mean_prompt"], found["mean_output"]) == pytest.approx((226.1, 195.7), abs=0.1)
    assert found["mean_inverse_output"] == pytest.approx(0.0375, abs=5e-5)


def test_the_share_is_of_entries_before_the_filter():
    cut, first = (client_lengths(share, "or").weights for share in (1.0, 0.0))
    assert client_lengths(0.3, "or").weights == pytest.approx(0.3 * cut + 0.7 * first)


def test_the_artifacts_filter_is_the_default_and_keeps_short_answers():
    prompt, output = load_trace("sharegpt-client").sample(400_000, np.random.default_rng(0))
    assert ARTIFACT_FILTER.keeps(prompt, output).all()
    assert not CLIENT_FILTER.keeps(prompt, output).all()
    assert output.min() == 1
    # Answers of "yes" and "go on": one token and the BOS.
    assert (output < 4).mean() == pytest.approx(0.025, abs=0.002)
    by_client = load_trace("sharegpt-client:filter=or").sample(100_000, np.random.default_rng(0))
    assert CLIENT_FILTER.keeps(*by_client).all()


@pytest.mark.parametrize("spec", ["sharegpt-opt", "sharegpt-client", "sharegpt-client:share=0.2,filter=or"])
def test_samples_tend_to_the_exact_statistics_and_a_longer_sample_extends_a_shorter(spec):
    source = load_trace(spec)
    prompt, output = source.sample(1_000_000, np.random.default_rng(3))
    exact, drawn = source.statistics(), length_statistics(prompt, output)
    assert drawn.pop("correlation") == pytest.approx(exact.pop("correlation"), abs=0.004)
    assert drawn == pytest.approx(exact, rel=0.01)
    shorter = source.sample(1000, np.random.default_rng(3))
    assert (prompt[:1000] == shorter[0]).all()
    assert (output[:1000] == shorter[1]).all()


def test_what_is_fitted_to_the_papers_points_says_so():
    assert "fitted to the paper's own points" in load_trace(f"sharegpt-client:share={FITTED_SHARE}").description
    assert "fitted" not in load_trace("sharegpt-client").description


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("share=1.5", "must be 0 to 1, not 1.5"),
        ("share=-0.1", "must be 0 to 1, not -0.1"),
        ("share=half", "share must be a finite number, not 'half'"),
        ("filter=nor", "filter must be one of and, or, not 'nor'"),
        ("filter", "unknown option 'filter'; valid options as key=value: share, filter"),
        ("filter=or,filter=and", "option 'filter' is given twice"),
        ("skew=1", "unknown option 'skew=1'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        load_trace(f"sharegpt-client:{options}")
    assert str(caught.value).startswith("trace 'sharegpt-client'")
    assert message in str(caught.value)


def test_opening_is_fast():
    client_lengths.cache_clear()
    begin = time.process_time()
    load_trace("sharegpt-client").sample(1000, np.random.default_rng(0))
    assert time.process_time() - begin < 1.0  # 0.15 s on an idle core.


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=3, max_size=3).filter(
        lambda rows: sum(map(sum, rows)) > 0
    ),
    seed=st.integers(0, 2**32),
)
def test_a_pair_without_weight_is_never_drawn_and_every_other_is(weights, seed):
    weights = np.array(weights, dtype=float)
    prompt, output = JointLengths("", weights).sample(4000, np.random.default_rng(seed))
    drawn = np.zeros_like(weights)
    np.add.at(drawn, (prompt - 1, output - 1), 1)
    assert ((drawn > 0) == (weights > 0)).all()


def test_a_draw_that_rounds_up_to_the_sum_of_the_weights_is_the_last_pair_with_a_weight():
    class AlmostOne:
        def random(self, n):
            return np.full(n, np.nextafter(1, 0))

    source = JointLengths("", np.array([[0.1, 0.2, 0.3], [0.7, 1e-17, 0]]))
    prompt, output = source.sample(1, AlmostOne())
    assert source.weights[prompt[0] - 1, output[0] - 1] > 0


def test_filtered_cuts_to_the_largest_lengths_and_keeps_the_other_weights():
    limits = LengthFilter(min_prompt=2, min_output=2, max_prompt=3, max_total=5, minima="and")
    assert filtered(np.ones((6, 6)), limits).tolist() == [[0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]


def test_build_script_keeps_the_bins_of_a_histogram_and_sums_probabilities(tmp_path):
    turns, messages = tmp_path / "turns.csv", tmp_path / "messages.csv"
    turns.write_text("prompt_from,output_from,count\n1,2,3\n2,1024,5\n2049,1,7\n1024,2,1\n")
    rows = "\n".join(f"{tokens},{0.001},{0.0005}" for tokens in range(1, 2101))
    messages.write_text(f"tokens,human,assistant\n{rows}\n")
    script = str(ROOT / "tools/build_trace_tables.py")
    inputs = ["--sharegpt-opt", str(turns), "--sharegpt-messages", str(messages), "--out", str(tmp_path)]
    subprocess.run([sys.executable, script, *inputs], check=True, capture_output=True)
    table = json.loads((tmp_path / "sharegpt_opt.json").read_text())
    assert table["prompt_edges"] == [1, 2, 1024, 2049]
    assert (table["input"]["records"], table["input"]["kept"]) == (16, 9)
    assert table["bins"] == [[0, 1, 3], [1, 2, 5], [2, 1, 1]]
    table = json.loads((tmp_path / "sharegpt_messages.json").read_text())
    sizes = np.diff(table["edges"])
    assert table["edges"][-1] == 2049
    assert [row[1:] for row in table["bins"]] == [
        pytest.approx([0.001 * size, 0.0005 * size], rel=1e-5) for size in sizes
    ]

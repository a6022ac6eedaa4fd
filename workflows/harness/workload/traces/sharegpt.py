"""ShareGPT's lengths as the paper's clients saw them: first turns, and conversations that begin with an answer.

ShareGPT_V3, which benchmark clients read, splits long conversations into several entries, so that many of them begin
with an answer. Clients take the first two messages of an entry for a prompt and its output, whatever their authors. So
a share of the entries is (answer -> next question), with long prompts and short outputs. Nothing that is published
says how many they are: `client_share` derives it from two means that clients logged.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any

import numpy as np

from fastserve.core.errors import ConfigError
from harness.workload.options import parse_choice, parse_number, parse_options, split_options
from harness.workload.traces.histogram import read_table
from harness.workload.traces.joint import JointLengths, filtered
from harness.workload.traces.lengths import (
    ARTIFACT_FILTER,
    CLIENT_FILTER,
    FloatArray,
    IntArray,
    LengthFilter,
    LengthSource,
)

CLIENT_MEANS = (228.0, 196.0)
"""ShareGPT's mean prompt and output under `CLIENT_FILTER`, from logs of vLLM's benchmark client: 229.7 and 203.1 over
1,000 requests (vllm-project/vllm, pull request 18566), 226.8 and 188.2 over 2,000 (sgl-project/sglang, issue 1639)."""
CLIENT_SHARE = 0.55
"""Share of entries, before the filter, that begin with an answer: `client_share()` to two digits."""
FITTED_SHARE = 0.45
"""The share whose simulated FCFS curve is closest to the paper's on OPT-13B: fitted to the points to be explained."""
FILTERS = {"and": ARTIFACT_FILTER, "or": CLIENT_FILTER}
FIRST_TURN_FILTER = LengthFilter(min_prompt=1, min_output=1, max_prompt=2047, max_total=2048)
"""OPT's context, the only bound that vLLM's paper puts on first turns."""
_BOS = 1
"""OPT's tokenizer puts one token before every text; the messages were counted without such a token."""


def open_first_turns(options: str) -> LengthSource:
    """Open `sharegpt-opt`."""
    parse_options("trace 'sharegpt-opt'", options, {})
    return _first_turn_lengths()


def open_client(options: str) -> LengthSource:
    """Open `sharegpt-client`. Raises ConfigError for a share outside 0 to 1 and for an unknown filter."""
    owner = "trace 'sharegpt-client'"
    given = split_options(owner, options, ("share", "filter"))
    share = parse_number(owner, "share", given.get("share", str(CLIENT_SHARE)))
    if not 0 <= share <= 1:
        raise ConfigError(f"{owner}: share, of entries that begin with an answer, must be 0 to 1, not {share:g}")
    return client_lengths(share, parse_choice(owner, "filter", given.get("filter", "and"), FILTERS))


@cache
def _first_turn_lengths() -> JointLengths:
    table = read_table("sharegpt_opt")
    return JointLengths(table["description"], filtered(_first_turns(), FIRST_TURN_FILTER))


@lru_cache(maxsize=4)
def client_lengths(share: float, minima: str) -> JointLengths:
    """Mix entries that begin with an answer, a share of them, with first turns, and filter the mixture."""
    limits = FILTERS[minima]
    weights = share * filtered(_cut_turns(), limits) + (1 - share) * filtered(_first_turns(), limits)
    description = (
        f"sharegpt-client: {share:g} of the entries an answer with the next question, of independent lengths; the "
        f"others first turns; {limits.rule}"
    )
    if share == FITTED_SHARE:
        description += "; the share is fitted to the paper's own points, not derived from data"
    return JointLengths(description, weights)


def client_share() -> float:
    """Derive the share from `CLIENT_MEANS`: the one that comes closest to both, by the sum of squares of the logs."""
    from scipy.optimize import minimize_scalar  # Slow to import, and only the derivation needs it.

    parts = [filtered(weights, CLIENT_FILTER) for weights in (_cut_turns(), _first_turns())]
    prompt, output = (np.arange(1, size + 1) for size in parts[0].shape)
    # Of each part: the share that the filter keeps, and the prompt and output tokens in it.
    moments = [np.array([part.sum(), part.sum(axis=1) @ prompt, part.sum(axis=0) @ output]) for part in parts]

    def distance(share: float) -> float:
        kept, *tokens = share * moments[0] + (1 - share) * moments[1]
        return float((np.log(np.array(tokens) / kept / CLIENT_MEANS) ** 2).sum())

    return float(minimize_scalar(distance, bounds=(0, 1), method="bounded").x)


def table_weights(table: Mapping[str, Any]) -> FloatArray:
    """Spread the counts of a table evenly inside each bin, as shares of all its records, [prompts, outputs]."""
    prompt_edges, output_edges = np.array(table["prompt_edges"]), np.array(table["output_edges"])
    prompt_bin, output_bin, counts = np.array(table["bins"]).T
    weights = np.zeros((len(prompt_edges) - 1, len(output_edges) - 1))
    weights[prompt_bin, output_bin] = counts / table["input"]["records"]
    return _spread(_spread(weights, prompt_edges).T, output_edges).T


def _first_turns() -> FloatArray:
    """Probabilities of the lengths of a first turn, up to 2,048 tokens each; longer ones have the rest."""
    return table_weights(read_table("sharegpt_opt"))


def _cut_turns() -> FloatArray:
    """Probabilities of the lengths of an answer and of an independent question, up to 2,048 tokens each."""
    table = read_table("sharegpt_messages")
    question, answer = np.array(table["bins"]).T[1:]
    edges = np.array(table["edges"])
    return np.outer(*(_with_bos(_spread(each, edges)) for each in (answer, question)))


def _spread(weights: FloatArray, edges: IntArray) -> FloatArray:
    """Spread the weights of bins [bins, ...] evenly over the tokens in each, [tokens from 1, ...]."""
    sizes = np.diff(edges)
    return np.repeat((weights.T / sizes).T, sizes, axis=0)


def _with_bos(weights: FloatArray) -> FloatArray:
    """Count one more token in every message, and drop the longest."""
    return np.concatenate([np.zeros(_BOS), weights[:-_BOS]])

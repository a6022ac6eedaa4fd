"""Rebuild the shipped length tables from the raw data sets, which are not shipped.

    python tools/build_trace_tables.py --sharegpt sharegpt_first_turn.csv --azure azure_llm_2023_conv.csv
    python tools/build_trace_tables.py --sharegpt-opt first_turns_hist.csv --sharegpt-messages message_lengths_pmf.csv

A table of requests is a histogram over prompt × output whose edges are spaced evenly in the logarithm. Each axis has 24
to 48 bins: the numbers whose statistics come closest to the data's. A table of numbers that were published as a
histogram keeps its bins, up to 2,048 tokens.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np

from harness.workload.traces import LengthFilter, RecordedLengths, length_statistics, load_trace
from harness.workload.traces.histogram import TABLES
from harness.workload.traces.joint import JointLengths, filtered
from harness.workload.traces.lengths import CLIENT_FILTER, FloatArray, IntArray
from harness.workload.traces.sharegpt import FIRST_TURN_FILTER, table_weights

MANIFEST = Path(__file__).resolve().parents[1] / "traces/manifest.json"
"""Says where each data set is published, under what licence, and how to cite it."""
BIN_COUNTS = range(24, 49)
"""Numbers of bins tried on each axis."""
LONGEST = 2048
"""Longest length in a table made of a histogram, in tokens: the models' context."""
SINGLE, LOG_BINS = 64, 44
"""A table of message lengths has a bin for each length below `SINGLE`, and this many bins from there to `LONGEST`."""


def log_edges(lengths: IntArray, bins: int) -> IntArray:
    """Cut [min, max + 1) into at most `bins` half-open integer ranges, equally wide in the logarithm."""
    return np.unique(np.rint(np.geomspace(lengths.min(), lengths.max() + 1, bins + 1)).astype(np.int64))


def count(prompt: IntArray, output: IntArray, prompt_edges: IntArray, output_edges: IntArray) -> IntArray:
    """Count requests in each cell of the grid."""
    return np.histogram2d(prompt, output, bins=(prompt_edges, output_edges))[0].astype(np.int64)


def table_statistics(counts: IntArray, prompt_edges: IntArray, output_edges: IntArray) -> dict[str, float]:
    """Compute the exact limit of `length_statistics` for samples that are uniform inside each cell."""
    weights = counts / counts.sum()
    prompt_weights, output_weights = weights.sum(axis=1), weights.sum(axis=0)
    prompt_mean, prompt_square, _ = _bin_moments(prompt_edges)
    output_mean, output_square, output_inverse = _bin_moments(output_edges)
    mean_prompt, mean_output = prompt_weights @ prompt_mean, output_weights @ output_mean
    std_prompt = np.sqrt(prompt_weights @ prompt_square - mean_prompt**2)
    std_output = np.sqrt(output_weights @ output_square - mean_output**2)
    covariance = prompt_mean @ weights @ output_mean - mean_prompt * mean_output
    return {
        "mean_prompt": float(mean_prompt),
        "mean_output": float(mean_output),
        "std_prompt": float(std_prompt),
        "std_output": float(std_output),
        "mean_inverse_output": float(output_weights @ output_inverse),
        "correlation": float(covariance / (std_prompt * std_output)),
    }


def _bin_moments(edges: IntArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Compute E[x], E[x^2] and E[1/x] of a uniform integer in each bin."""
    low, high = edges[:-1], edges[1:] - 1
    size, mean = edges[1:] - edges[:-1], (low + high) / 2
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, edges[-1]))])
    return mean, mean**2 + (size**2 - 1) / 12, (harmonic[high] - harmonic[low - 1]) / size


def worst_error(table: dict[str, float], data: dict[str, float]) -> float:
    """Compute the largest relative difference of any statistic."""
    return max(abs(table[name] / data[name] - 1) for name in data)


def build(name: str, path: Path, kind: str, data_set: str, limits: LengthFilter | None) -> dict[str, Any]:
    """Make the table behind the built-in trace `name` from a raw file that the manifest describes as `data_set`."""
    records = load_trace(f"{kind}:{path}")
    assert isinstance(records, RecordedLengths)
    prompt, output = records.prompt_tokens, records.output_tokens
    if limits:
        kept = limits.keeps(prompt, output)
        prompt, output = prompt[kept], output[kept]
    statistics = length_statistics(prompt, output)

    def grids() -> Iterator[tuple[float, IntArray, IntArray, IntArray, dict[str, float]]]:
        for prompt_bins, output_bins in product(BIN_COUNTS, BIN_COUNTS):
            edges = log_edges(prompt, prompt_bins), log_edges(output, output_bins)
            counts = count(prompt, output, *edges)
            achieved = table_statistics(counts, *edges)
            yield worst_error(achieved, statistics), *edges, counts, achieved

    error, prompt_edges, output_edges, counts, achieved = min(grids(), key=lambda grid: grid[0])
    source = manifest_entry(data_set)
    after = " after the filter of vLLM's client" if limits else ""
    return {
        "description": f"{name}: drawn from the histogram of {len(prompt)} requests{after}; {source['title']}",
        **origin(source, path, records=len(records), kept=len(prompt)),
        "filter": asdict(limits) if limits else None,
        "statistics": statistics,
        "table_statistics": achieved,
        "worst_relative_error": round(error, 6),
        "layout": "bins: [prompt bin, output bin, count], empty ones omitted; bin i is edges[i] to edges[i + 1] - 1",
        "prompt_edges": prompt_edges.tolist(),
        "output_edges": output_edges.tolist(),
        "bins": [[int(i), int(j), int(counts[i, j])] for i, j in np.argwhere(counts)],
    }


def build_first_turns(path: Path) -> dict[str, Any]:
    """Make the table behind `sharegpt-opt` from a histogram with columns prompt_from, output_from, count.

    Bins with more than `LONGEST` tokens on an axis are counted in `input.records` only.
    """
    source = manifest_entry("sharegpt-opt-first-turns")
    prompt, output, counts = read_columns(path, "prompt_from", "output_from", "count").astype(np.int64)
    edges = np.unique(np.concatenate([prompt, output]))
    edges = edges[edges <= LONGEST + 1]
    assert edges[-1] == LONGEST + 1, f"{path}: no bin begins at {LONGEST + 1}"
    kept = (prompt <= LONGEST) & (output <= LONGEST)
    bins = np.stack([*np.searchsorted(edges, [prompt[kept], output[kept]]), counts[kept]], axis=1)
    bins = bins[np.lexsort((bins[:, 1], bins[:, 0]))]
    table = {
        "description": f"sharegpt-opt: drawn from the histogram of {counts.sum():,} first turns; {source['title']}; "
        f"kept if prompt and output together are at most {LONGEST:,} tokens",
        **origin(source, path, records=int(counts.sum()), kept=int(counts[kept].sum())),
        "filter": None,
        "layout": "bins: [prompt bin, output bin, count], empty ones omitted; bin i is edges[i] to edges[i + 1] - 1",
        "prompt_edges": edges.tolist(),
        "output_edges": edges.tolist(),
        "bins": bins.tolist(),
    }
    return {**table, "statistics": JointLengths("", filtered(table_weights(table), FIRST_TURN_FILTER)).statistics()}


def build_messages(path: Path) -> dict[str, Any]:
    """Make the table of message lengths from probabilities with columns tokens, human, assistant."""
    source = manifest_entry("sharegpt-messages")
    tokens, human, assistant = read_columns(path, "tokens", "human", "assistant")
    firsts = np.concatenate([np.arange(1, SINGLE), np.rint(np.geomspace(SINGLE, LONGEST + 1, LOG_BINS + 1))[:-1]])
    inside = tokens <= LONGEST
    bins = np.searchsorted(firsts, tokens[inside], side="right") - 1
    sums = [np.bincount(bins, weights=each[inside], minlength=len(firsts)) for each in (human, assistant)]
    return {
        "description": f"lengths of ShareGPT's messages; {source['title']}",
        **origin(source, path, longest=int(tokens.max())),
        "filter": None,
        "statistics": {"mean_human": float(human @ tokens), "mean_assistant": float(assistant @ tokens)},
        "layout": "bins: [first length, share of the questions, of the answers]; bin i is edges[i] to edges[i + 1] - 1",
        "edges": [*firsts.astype(int).tolist(), LONGEST + 1],
        "bins": [
            [int(first), *(float(f"{share:.6g}") for share in shares)]
            for first, *shares in zip(firsts, *sums, strict=True)
        ],
    }


def read_columns(path: Path, *names: str) -> FloatArray:
    """Read columns of numbers from a CSV file with a header, [columns, rows]."""
    with path.open(encoding="utf-8", newline="") as file:
        return np.array([[float(row[name]) for name in names] for row in csv.DictReader(file)]).T


def manifest_entry(data_set: str) -> dict[str, Any]:
    """Look up a data set of the manifest by name."""
    manifest = json.loads(MANIFEST.read_text(encoding="utf-8"))
    entry: dict[str, Any] = next(entry for entry in manifest["data_sets"] if entry["name"] == data_set)
    return entry


def origin(source: dict[str, Any], path: Path, **counts: int) -> dict[str, Any]:
    """Say where a table's numbers come from: the data set, its licence, and the file that was read."""
    return {
        "source": f"{source['title']}. {source['citation']}.",
        "url": source["url"],
        "licence": source["licence"],
        "input": {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **counts},
    }


def write(table: dict[str, Any], path: Path) -> None:
    """Write a table as JSON, the bins of one prompt bin to a line."""
    fields = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in table.items() if name != "bins"]
    rows = [json.dumps(list(row))[1:-1] for _, row in groupby(table["bins"], key=lambda cell: cell[0])]
    text = "{\n" + ",\n".join(fields) + ',\n  "bins": [\n    ' + ",\n    ".join(rows) + "\n  ]\n}\n"
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """Rebuild the tables whose raw file is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sharegpt", type=Path, help="CSV with prompt_tokens,output_tokens of ShareGPT first turns")
    parser.add_argument("--azure", type=Path, help="Azure LLM inference trace 2023, conversation, as published")
    parser.add_argument("--sharegpt-opt", type=Path, help="CSV with prompt_from,output_from,count of first turns")
    parser.add_argument("--sharegpt-messages", type=Path, help="CSV with tokens,human,assistant, both probabilities")
    parser.add_argument("--out", type=Path, default=Path(str(TABLES)), help="folder (default: the package's)")
    options = parser.parse_args()
    jobs = {
        "sharegpt": (
            options.sharegpt,
            lambda path: build("sharegpt", path, "csv", "sharegpt-first-turn", CLIENT_FILTER),
        ),
        "azure_conv": (options.azure, lambda path: build("azure-conv", path, "azure", "azure-2023-conv", None)),
        "sharegpt_opt": (options.sharegpt_opt, build_first_turns),
        "sharegpt_messages": (options.sharegpt_messages, build_messages),
    }
    if not any(path for path, _ in jobs.values()):
        parser.error("give at least one of --sharegpt, --azure, --sharegpt-opt, --sharegpt-messages")
    for stem, (path, make) in jobs.items():
        if path:
            table = make(path)
            target = options.out / f"{stem}.json"
            write(table, target)
            error = table.get("worst_relative_error")
            fit = "" if error is None else f", every statistic within {error:.2%} of the data's"
            print(f"{target}: {len(table['bins'])} bins{fit}")


if __name__ == "__main__":
    main()

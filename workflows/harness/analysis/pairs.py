"""Pairs: each metric of each real run beside the same of its simulation, the worst first. None is averaged away."""

from __future__ import annotations

import pandas as pd

BOUND = 0.1
"""Largest relative error that counts as agreement."""
_RUN = ("series", "label", "load", "seed")


def pairs_of(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each run and metric, sorted by the size of the error; those without a value come first.

    `runs` has a row for each run, with columns real_, sim_ and error_ = (sim - real) / real of each metric. The
    columns: series, label, load, seed, metric, real, sim, error, within (whether the error is at most `BOUND`).
    """
    metrics = [str(name).removeprefix("error_") for name in runs if str(name).startswith("error_")]
    parts = []
    for metric in metrics:
        part = runs[[name for name in _RUN if name in runs]].assign(metric=metric)
        for kind in ("real", "sim", "error"):
            part[kind] = runs[f"{kind}_{metric}"].astype(float)
        parts.append(part)
    pairs = pd.concat(parts)
    pairs = pairs.assign(within=pairs["error"].abs() <= BOUND)
    return pairs.sort_values("error", key=lambda error: -error.abs(), na_position="first", kind="stable").reset_index(
        drop=True
    )


def worst_runs_first(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `runs` in the order of their worst pairs."""
    errors = runs[[name for name in runs if str(name).startswith("error_")]].astype(float).abs()
    worst = errors.max(axis=1, skipna=False)
    return runs.loc[worst.sort_values(ascending=False, na_position="first", kind="stable").index]

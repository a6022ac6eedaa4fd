"""Rebuild the shipped tables of measured runs from the recordings of others, which are not shipped.

    python tools/build_measured_runs.py rtx4090=rtx4090-llama-3.1-8b.csv rtxpro6000=rtxpro6000-llama-3.1-8b.csv

A recording has a row a request with the columns of COLUMNS, in seconds and tokens. A table has these, in order of
arrival, rounded to 0.1 ms. tables/measured_runs.json, written by hand, says what was run, and where it is published.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from fastserve.core.console import exit_on_error
from fastserve.core.errors import ConfigError
from harness.studies.measured.table import COLUMNS, check_table
from harness.workload.traces.measured import measured_run

DECIMALS = 4


def build(recording: Path) -> pd.DataFrame:
    """Make the table of a run from its recording. Raises ConfigError for a recording that cannot be."""
    try:
        table = pd.read_csv(recording)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {recording}: {error}") from None
    if missing := [column for column in COLUMNS if column not in table]:
        raise ConfigError(f"{recording}: no column {', '.join(missing)}; it has {', '.join(table)}")
    table = table[list(COLUMNS)].sort_values("arrival_s", kind="stable").round(DECIMALS)
    check_table(table, str(recording))
    return table


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FILE", help="name of the run, and its recording")
    with exit_on_error():
        for given in parser.parse_args().runs:
            name, separator, recording = given.partition("=")
            if not separator:
                raise ConfigError(f"give NAME=FILE, such as rtx4090=recording.csv, not {given!r}")
            path = measured_run(name).path
            table = build(Path(recording))
            table.to_csv(path, index=False, lineterminator="\n")
            print(f"wrote {path}: {len(table)} requests")


if __name__ == "__main__":
    main()

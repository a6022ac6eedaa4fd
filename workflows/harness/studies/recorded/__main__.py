"""Record the runs of a design on this machine's GPU into a folder; a call resumes where the last one stopped.

Exits with 0 if all runs are recorded, with 3 if time ran out, with 2 on bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastserve.core.errors import FastServeError
from harness.studies.recorded.design import add_design_options, design_of
from harness.studies.recorded.recording import MORE_TO_DO, record


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.studies.recorded",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that holds profile.json; the runs go there")
    parser.add_argument("--minutes", type=float, help="start no run that would end later (default: no bound)")
    add_design_options(parser)
    options = parser.parse_args(arguments)
    try:
        done = record(design_of(options), options.out, options.minutes)
    except FastServeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if done else MORE_TO_DO)


if __name__ == "__main__":
    main()

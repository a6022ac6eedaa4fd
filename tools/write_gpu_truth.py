"""Put the tables and figures of the experiment gpu-truth into docs/gpu-truth.md and docs/images, once it has run.

    python tools/write_gpu_truth.py

It reads results/gpu-truth/tables.md and figures/gpu-truth*.png of the working directory.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from fastserve.core.console import exit_on_error
from fastserve.core.errors import ConfigError

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "gpu-truth.md"
TABLES = Path("results/gpu-truth/tables.md")
FIGURES = ("gpu-truth.png", "gpu-truth-policies.png")
_BEGIN, _END = "<!-- {}: tools/write_gpu_truth.py writes this table -->\n", "<!-- end -->"


def with_tables(page: str, tables: str) -> str:
    """Return the page with its tables, errors and policies, replaced. Raises ConfigError if it lacks their places."""
    for name, table in zip(("errors", "policies"), tables.split("\n\n"), strict=True):
        begin = _BEGIN.format(name)
        before, found, rest = page.partition(begin)
        _, end, after = rest.partition(_END)
        if not (found and end):
            raise ConfigError(f"{PAGE} has no place for the table of {name}: the lines {begin.strip()!r} and {_END!r}")
        page = f"{before}{begin}{table.strip()}\n{_END}{after}"
    return page


def main() -> None:
    """Entry point."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with exit_on_error():
        sources = [TABLES, *(Path("figures") / name for name in FIGURES)]
        if missing := [str(path) for path in sources if not path.exists()]:
            raise ConfigError(f"there is no {', '.join(missing)}; run snakemake's target gpu-truth first")
        page = with_tables(PAGE.read_text(encoding="utf-8"), TABLES.read_text(encoding="utf-8"))
        PAGE.write_text(page, encoding="utf-8")
        for path in sources[1:]:
            shutil.copy(path, DOCS / "images" / path.name)
        print(f"wrote {PAGE} and {', '.join(FIGURES)}")


if __name__ == "__main__":
    main()

"""Write the pages of docs whose numbers come out of the pipeline, from templates (workflows/report/pages).

    python tools/write_pages.py               of the fresh tables in results/, which are recorded in docs/tables;
                                              figures that the pages show are copied to docs/images
    python tools/write_pages.py --recorded    of docs/tables as they are, after a template was edited
    python tools/write_pages.py --add-fidelity results/fidelity results/fidelity-parallel
                                              add what these experiments measured to docs/tables/fidelity.csv first

It takes results/ and figures/ of the working directory.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from fastserve.core.console import exit_on_error
from fastserve.core.errors import ConfigError
from fastserve.core.files import atomic_write
from harness.analysis.files import read_json, read_table
from harness.experiments.folder import read_experiments
from harness.report.pages import Recorded, Results, Source, record, render, templates
from harness.report.pages.recorded import FIDELITY, read_recorded, write_recorded
from harness.report.pages.render import page_name

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = ROOT / "workflows/report/pages"
TABLES = ROOT / "docs/tables"
PLOTTED = (ROOT / "workflows/data/reported_points.csv", ROOT / "workflows/data/artifact_rerun_points.csv")


def write_of_results(results: Path, figures: Path, docs: Path) -> list[Path]:
    """Record what the pages take of `results`, write the pages to `docs` and copy their figures; return the pages."""
    experiments = read_experiments(ROOT / "workflows/config/experiments")
    fresh = Results(results, experiments, PLOTTED, read_recorded(docs / "tables" / f"{FIDELITY}.csv")[0])
    pages = {template: render(template, fresh, ROOT) for template in templates(TEMPLATES)}
    record(fresh, docs / "tables")
    for page in pages.values():
        copy_figures(page, figures, docs / "images")
    return write_of(Recorded(docs / "tables"), docs)


def write_of(source: Source, docs: Path) -> list[Path]:
    """Write every page to `docs`; return their paths."""
    paths = []
    for template in templates(TEMPLATES):
        path = docs / page_name(template)
        with atomic_write(path) as staging:
            staging.write_text(render(template, source, ROOT), encoding="utf-8")
        paths.append(path)
    return paths


def copy_figures(page: str, figures: Path, images: Path) -> None:
    """Copy the figures that a page shows and the pipeline has drawn."""
    for name in dict.fromkeys(re.findall(r"\]\(images/([\w.-]+)\)", page)):
        if (figures / name).exists():
            shutil.copy(figures / name, images / name)


def add_fidelity(folders: Sequence[Path], path: Path) -> None:
    """Add pairs.csv of fidelity experiments to the recorded table, as a further run of each."""
    table, provenance = read_recorded(path) if path.exists() else (pd.DataFrame(), "")
    lines = [provenance] if provenance else []
    for folder in folders:
        if not (folder / "pairs.csv").exists():
            raise ConfigError(f"there is no {folder / 'pairs.csv'}; run snakemake's target {folder.name} first")
        pairs = read_table(folder / "pairs.csv").drop(columns="panel")
        earlier = table[table["experiment"] == folder.name] if len(table) else table
        number = 1 + (int(earlier["run"].max()) if len(earlier) else 0)
        meta = read_json(folder / "runs" / pairs["series"][0] / f"load-{pairs['load'][0]:g}" / "real/meta.json")
        pairs.insert(0, "experiment", folder.name)
        pairs.insert(1, "run", number)
        table = pd.concat([table, pairs], ignore_index=True)
        hardware = meta["hardware"]
        lines.append(
            f"{folder.name} {number}: commit {meta['commit']}, {meta['core']} core, {hardware['cpu']} of "
            f"{hardware['cores']} cores, {meta['created_at'][:10]}."
        )
    write_recorded(table, " ".join(lines), path)
    print(f"wrote {path}: {len(table)} pairs, {datetime.now(UTC).date()}")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", action="store_true", help="of docs/tables, not of results/")
    parser.add_argument("--add-fidelity", type=Path, nargs="+", default=[], metavar="FOLDER", help="results/fidelity…")
    options = parser.parse_args()
    with exit_on_error():
        if options.add_fidelity:
            add_fidelity(options.add_fidelity, TABLES / f"{FIDELITY}.csv")
        docs = ROOT / "docs"
        if options.recorded:
            written = write_of(Recorded(TABLES), docs)
        else:
            written = write_of_results(Path("results"), Path("figures"), docs)
        print(f"wrote {', '.join(map(str, written))}")


if __name__ == "__main__":
    main()

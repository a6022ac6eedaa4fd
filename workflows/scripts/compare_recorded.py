"""Snakemake job: recorded runs of the real engine beside simulations of them."""

from pathlib import Path
from typing import TYPE_CHECKING

from joblog import logged

from harness.analysis.files import write_csv, write_json
from harness.studies.agreement import compare, describe

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    out = Path(snakemake.output.points)
    table = compare(Path("results/recorded") / snakemake.wildcards.gpu, out.parent / "runs")
    described = describe(table)
    text = "\n".join(f"* {line}" for line in described)
    write_json({snakemake.wildcards.gpu: text}, Path(snakemake.output.captions))
    write_csv(table, out)
    print("\n".join(described))
    print(f"wrote {out}: {len(table)} runs")

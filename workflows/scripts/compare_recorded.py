"""Snakemake job: recorded runs of the real engine beside simulations of them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from joblog import logged

from fastserve.files import written_whole
from harness.agreement import compare, describe
from harness.points import write_csv

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    out = Path(snakemake.output.points)
    table = compare(Path("results/recorded") / snakemake.wildcards.gpu, out.parent / "runs")
    described = describe(table)
    with written_whole(Path(snakemake.output.captions)) as staging:
        text = "\n".join(f"* {line}" for line in described)
        staging.write_text(json.dumps({snakemake.wildcards.gpu: text}, indent=1) + "\n", encoding="utf-8")
    write_csv(table, out)
    print("\n".join(described))
    print(f"wrote {out}: {len(table)} runs")

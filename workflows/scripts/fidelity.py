"""Snakemake job: the simulator against the real engine, on this machine."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from joblog import logged

from harness.analysis.files import read_table, write_json
from harness.report.captions import agreement_caption
from harness.studies.fidelity import measure_fidelity

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    start = time.monotonic()
    out, name = Path(snakemake.output.points), snakemake.wildcards.experiment
    table = measure_fidelity(snakemake.params.experiment, out.parent)
    pairs = read_table(Path(snakemake.output.pairs))
    print(pairs.drop(columns=["panel", "series"]).to_string(index=False, float_format="{:.4g}".format))
    said = agreement_caption(pairs)
    write_json({name: said}, Path(snakemake.output.captions))
    print(f"{name}: {said}", file=sys.stderr)
    print(f"at least {table['processor_share'].min():.1%} of the needed processors were left by other programs")
    print(f"wrote {out}: {len(table)} runs and their simulations, which took {time.monotonic() - start:.0f} s")

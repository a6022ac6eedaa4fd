"""Snakemake job: the simulator against the real engine, on this machine."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from joblog import logged

from harness.studies.fidelity import ALONE, JUDGED, measure_fidelity, verdict

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    start = time.monotonic()
    out = Path(snakemake.output[0])
    table = measure_fidelity(snakemake.params.experiment, out.parent)
    agrees = verdict(table)
    shown = table[["label", "load", "rate", *(f"error_{metric}" for metric in JUDGED)]].assign(agrees=agrees)
    print(shown.to_string(index=False, float_format="{:.3f}".format))
    print(f"{agrees.sum()} of {len(agrees)} runs within 10 % in mean and P95 completion time")
    share = table["processor_share"].min()
    if share < ALONE:
        print(f"warning: other processes took {1 - share:.0%} of the processor; repeat on an idle machine")
    print(f"wrote {out}: {len(table)} pairs of runs, which took {time.monotonic() - start:.0f} s")

"""Snakemake job: servers side by side on this machine, driven over HTTP."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from joblog import logged

from harness.studies.served import measure_served

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

SHOWN = ("output_tokens_per_s", "mean_normalized_latency_s", "mean_ttft_s")

with logged(snakemake.log[0]):
    start = time.monotonic()
    out = Path(snakemake.output.points)
    vllm = snakemake.input.get("vllm")
    table = measure_served(snakemake.params.experiment, out.parent, Path(vllm).parent if vllm else None)
    comparison, agreement = (pd.read_csv(path) for path in (snakemake.output.comparison, snakemake.output.agreement))
    shown = comparison[comparison["metric"].isin(SHOWN)].drop(columns="label")
    for found in (shown, agreement):
        print(found.to_string(index=False, float_format="{:.3g}".format))
    print(f"wrote {out}: {len(table)} runs, which took {time.monotonic() - start:.0f} s with the starts of all servers")

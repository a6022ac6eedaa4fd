"""Snakemake job: carry out a batch of runs of the real engine in this process, and write what they measured."""

from pathlib import Path
from typing import TYPE_CHECKING

from joblog import logged

from harness.pipeline.batch import carry_out, write_batch
from harness.run.config import RunConfig

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    results = []
    for config in snakemake.params.configs:
        results.append(carry_out(RunConfig(**config)))
        print(results[-1].line)
    write_batch(results, Path(snakemake.output.results))

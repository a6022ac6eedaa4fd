"""Snakemake job: run one series with one seed at every rate, in one process."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from joblog import logged

from harness.runner import RunConfig, run

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    if snakemake.params.torch_threads:
        import torch

        torch.set_num_threads(snakemake.params.torch_threads)

    name = snakemake.rule.removeprefix("sweep_")
    configs = [RunConfig(**config) for config in snakemake.params.configs]
    for i, (config, summary_file) in enumerate(zip(configs, snakemake.output.summary, strict=True), 1):
        start = time.monotonic()
        summary = run(config, Path(summary_file).parent)
        latency = summary["mean_normalized_latency_s"]
        print(
            f"{name}: {snakemake.wildcards.series}, seed {config.seed}, "
            f"{config.rate:g} requests/s ({i} of {len(configs)}): "
            + (f"{latency:.3g} s/token" if latency is not None else "no request finished")
            + (f", {summary['failed']} failed" if summary["failed"] else "")
            + f", took {time.monotonic() - start:.1f} s"
        )

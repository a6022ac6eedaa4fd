"""Snakemake job: carry out a batch of runs in one process, and write what they measured into one file."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from joblog import logged

from fastserve.core.errors import NothingFinishedError
from fastserve.latency import load_profile
from harness.analysis.derived import derived_metrics
from harness.analysis.files import write_json
from harness.experiments.points import run_name
from harness.run.config import RunConfig
from harness.run.runner import run

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    configs = [RunConfig(**config) for config in snakemake.params.configs]
    folder = Path(snakemake.params.folder)
    results = {}
    for i, config in enumerate(configs, 1):
        start = time.monotonic()
        out = folder / run_name(config)
        title = (
            f"{config.policy}, {config.profile or config.model}, {config.trace}, {config.num_requests} requests"
            + (f" at {config.rate:g}/s" if config.rate is not None else "")
            + f", seed {config.seed} ({i} of {len(configs)})"
        )
        try:
            metrics = run(config, out)
        except NothingFinishedError as error:
            raise NothingFinishedError(f"{title}: {error.what}", error.where) from error
        metrics |= derived_metrics(out, load_profile(config.profile).latency if config.profile else None)
        seconds = time.monotonic() - start
        results[out.name] = {"folder": out.as_posix(), "metrics": metrics, "seconds": seconds}
        print(
            f"{title}: {metrics['mean_normalized_latency_s']:.3g} s/token"
            + (f", {metrics['failed']} failed" if metrics["failed"] else "")
            + f", took {seconds:.1f} s"
        )
    write_json(results, Path(snakemake.output[0]))

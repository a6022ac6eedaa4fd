"""Snakemake job: vLLM in an environment of its own, and the versions of what is in it."""

from pathlib import Path
from typing import TYPE_CHECKING

from joblog import logged

from baselines.external.environment import RECIPES, build
from harness.analysis.files import write_json

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with logged(snakemake.log[0]):
    out = Path(snakemake.output.versions)
    versions = build(RECIPES[snakemake.params.kind], out.parent)
    write_json({"kind": snakemake.params.kind, "versions": versions}, out)
    print(f"wrote {out}: vLLM {versions['vllm']}, {len(versions)} packages")

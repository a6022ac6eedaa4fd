"""From kernel tables to a profile: `fastserve profile --kernels`. No torch, no GPU."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from fastserve.core.checks import require_positive
from fastserve.core.config import ModelConfig
from fastserve.core.errors import ConfigError
from fastserve.core.parallel import ParallelConfig
from fastserve.latency.communication import HostLink
from fastserve.latency.kernel_latency import KernelLatency
from fastserve.latency.profile import Profile
from fastserve.profiling.kernels.aiconfigurator import read_aiconfigurator
from fastserve.profiling.kernels.imported import ImportedKernels
from fastserve.profiling.kernels.layer_tables import read_layer_tables
from fastserve.profiling.kernels.memory import FORMULA, cache_tokens

AICONFIGURATOR = "aiconfigurator:"
_PCIE_LATENCY_S = 10e-6


def import_profile(
    kernels: str,
    model: ModelConfig,
    parallel: ParallelConfig,
    name: str,
    memory_gb: float | None = None,
    memory_bandwidth: float | None = None,
) -> Profile:
    """Make the profile called `name` of kernel tables.

    Args:
        kernels: a folder in LLMServingSim's layout, or `aiconfigurator:` and a folder of a GPU and an engine's version.
        model: whose shard the tables are of, or which is put together of them.
        parallel: shards and stages.
        name: of the profile.
        memory_gb: of the GPU, in 1e9 bytes, if the tables do not say or another is meant.
        memory_bandwidth: of the GPU in bytes/s, if it differs from the measured one in its memory alone (aiconfigurator
            only).

    Raises:
        ConfigError: tables that are missing, wrong, or of another model, or a model that does not fit the GPU.
    """
    if memory_gb is not None:
        require_positive("--gpu-memory-gb", memory_gb)
    places = [
        parallel.place(stage * parallel.tensor_parallel_size, model) for stage in range(parallel.pipeline_parallel_size)
    ]
    read = _read(kernels, model, parallel, memory_gb, memory_bandwidth)
    first, *later = (KernelLatency(stage) for stage in read.stages)
    provenance = read.provenance | {
        "kv_capacity": FORMULA + f"; memory {read.gpu.memory_bytes / 1e9:.2f} GB",
        "host_link": (
            f"25 of every 32 GB/s of its PCIe ({read.gpu.pcie_bytes_per_s / 1e9:g} GB/s nominal) for each GPU, as "
            "achieved on an A100; latency assumed 10 us"
        ),
    }
    if read.warnings:
        provenance["warnings"] = list(read.warnings)
    return Profile(
        name=name,
        model=model.name,
        hardware=read.gpu.name,
        engine=read.engine,
        dtype=read.dtype,
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        stage=first,
        later_stages=tuple(later),
        stage_link=read.stage_link,
        kv_capacity_tokens=cache_tokens(model, places, read.gpu, read.dtype),
        kv_bytes_per_token=model.kv_bytes_per_token(read.dtype),
        largest_kv_bytes_per_token=parallel.rank_kv_bytes_per_token(model, read.dtype),
        host_link=HostLink(read.gpu.host_link_bytes_per_s * parallel.world_size, _PCIE_LATENCY_S),
        provenance=provenance,
        context_tokens=model.max_model_len,
        measured_range=first.tables.range,
        kind="measured kernels",
    )


def describe(profile: Profile) -> list[str]:
    """Lines about an imported profile, for people: its times, its range, and where it is not as measured."""
    latency, measured = profile.latency, profile.measured_range
    assert measured is not None
    bounds = ", ".join(f"{name.replace('_', ' ')} {bound:,}" for name, bound in asdict(measured).items() if bound)
    lines = [
        f"decode   {1e3 * latency.iteration_time((), (512,)):.2f} ms for a context of 512, "
        f"{1e3 * latency.iteration_time((), (512,) * 64):.2f} ms for 64 of them",
        f"prompt   {1e3 * latency.iteration_time((512,), ()):.2f} ms for 512 tokens",
        f"range    {bounds}",
        f"cache    {profile.kv_capacity_tokens:,} tokens: {profile.provenance['kv_capacity']}",
    ]
    return lines + [f"warning  {each}" for each in profile.provenance.get("warnings", ())]


def _read(
    kernels: str, model: ModelConfig, parallel: ParallelConfig, memory_gb: float | None, memory_bandwidth: float | None
) -> ImportedKernels:
    if kernels.startswith(AICONFIGURATOR):
        folder = Path(kernels.removeprefix(AICONFIGURATOR))
        return read_aiconfigurator(folder, model, parallel, memory_gb, memory_bandwidth)
    folder = Path(kernels)
    if not folder.is_dir():
        raise ConfigError(
            f"--kernels {kernels!r} is no folder; give one in LLMServingSim's layout (dense.csv, per_sequence.csv, "
            f"attention.csv, meta.yaml), or {AICONFIGURATOR}PATH/systems/data/a100_sxm/vllm/0.14.0"
        )
    if memory_bandwidth is not None:
        raise ConfigError("memory_bandwidth needs products and attention apart; give tables of aiconfigurator")
    if parallel.pipeline_parallel_size > 1:
        raise ConfigError(
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size}: tables in this layout are of one stage and "
            "say nothing of the link between two; give 1, or tables of aiconfigurator"
        )
    return read_layer_tables(folder, model, parallel.tensor_parallel_size, memory_gb)

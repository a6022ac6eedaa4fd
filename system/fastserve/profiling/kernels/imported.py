"""What a reader of kernel tables hands on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastserve.latency.communication import StageLink
from fastserve.latency.gpus import Gpu
from fastserve.latency.kernel_tables import KernelTables


@dataclass(frozen=True, slots=True)
class ImportedKernels:
    """Kernel times of a model's stages, and of what machine they are."""

    stages: tuple[KernelTables, ...]
    """From the first."""
    gpu: Gpu
    engine: str
    """Whose kernels they are, with its version."""
    dtype: str
    stage_link: StageLink | None
    """Between two stages; None where there is one stage."""
    provenance: dict[str, Any]
    """Source, method and assumptions."""
    warnings: tuple[str, ...] = ()
    """Where the times are not what was measured for this model."""

"""GPUs whose kernel tables do not say how much memory they have and how fast their link to the host is."""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.core.errors import ConfigError

_ACHIEVED = 25 / 32
"""Of a PCIe link's nominal bandwidth: 25 of the 32 GB/s of PCIe 4.0 x16, as in the project's A100 profiles."""


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """A GPU's memory and its link to the host."""

    name: str
    memory_bytes: float
    pcie_bytes_per_s: float
    """Nominal, in one direction."""

    @property
    def host_link_bytes_per_s(self) -> float:
        """Achieved in one direction."""
        return _ACHIEVED * self.pcie_bytes_per_s


_PCIE_4, _PCIE_5 = 32e9, 64e9
_GPUS = (
    GpuMemory("NVIDIA GeForce RTX 4090", 24 * 2**30, _PCIE_4),
    GpuMemory("NVIDIA RTX PRO 6000 Blackwell Server Edition", 101_976_440_832, _PCIE_5),
    GpuMemory("NVIDIA A100-SXM4-40GB", 40 * 2**30, _PCIE_4),
    GpuMemory("NVIDIA A100-SXM4-80GB", 80 * 2**30, _PCIE_4),
    GpuMemory("NVIDIA H100 80GB HBM3", 80 * 2**30, _PCIE_5),
    GpuMemory("NVIDIA H200", 141 * 2**30, _PCIE_5),
    GpuMemory("NVIDIA L40S", 46_068 * 2**20, _PCIE_4),
)


def gpu_called(name: str, where: str, memory_gb: float | None) -> GpuMemory:
    """The GPU of this name, with `memory_gb` in 1e9 bytes if given. ConfigError for an unknown one without it."""
    known = next((gpu for gpu in _GPUS if gpu.name == name), None)
    if memory_gb is not None:
        return GpuMemory(name, memory_gb * 1e9, known.pcie_bytes_per_s if known else _PCIE_4)
    if known is None:
        raise ConfigError(
            f"{where}: GPU {name!r} is not known, so neither is its memory; give --gpu-memory-gb. Known: "
            + ", ".join(gpu.name for gpu in _GPUS)
        )
    return known

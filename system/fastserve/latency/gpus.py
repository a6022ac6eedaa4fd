"""GPUs as their vendors describe them."""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.core.errors import ConfigError

_ACHIEVED = 25 / 32
"""Of a PCIe link's nominal bandwidth: 25 of the 32 GB/s of PCIe 4.0 x16, as measured on A100s."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU's memory and its link to the host."""

    name: str
    memory_bytes: float
    pcie_bytes_per_s: float
    """Nominal, in one direction."""

    @property
    def host_link_bytes_per_s(self) -> float:
        """Achieved in one direction."""
        return _ACHIEVED * self.pcie_bytes_per_s


@dataclass(frozen=True, slots=True)
class RatedGpu(Gpu):
    """A GPU whose speed is known too, as the roofline needs it."""

    bandwidth_bytes_per_s: float
    """Of its memory."""
    flops_per_s: float
    """Dense fp16 peak."""


_PCIE_4, _PCIE_5 = 32e9, 64e9

A100_40G = RatedGpu("NVIDIA A100-SXM4-40GB", 42.3e9, _PCIE_4, 1.555e12, 312e12)
"""Its memory is what the driver leaves of 40 GiB, which the artifact's formula for the cache starts from."""
A100_80G = RatedGpu("NVIDIA A100-SXM4-80GB", 80 * 2**30, _PCIE_4, 2.04e12, 312e12)
_GPUS = (
    A100_40G,
    A100_80G,
    Gpu("NVIDIA GeForce RTX 4090", 24 * 2**30, _PCIE_4),
    Gpu("NVIDIA RTX PRO 6000 Blackwell Server Edition", 101_976_440_832, _PCIE_5),
    Gpu("NVIDIA H100 80GB HBM3", 80 * 2**30, _PCIE_5),
    Gpu("NVIDIA H200", 141 * 2**30, _PCIE_5),
    Gpu("NVIDIA L40S", 46_068 * 2**20, _PCIE_4),
)


def gpu_called(name: str, where: str, memory_gb: float | None) -> Gpu:
    """The GPU of this name, with `memory_gb` in 1e9 bytes if given. ConfigError for an unknown one without it."""
    known = next((gpu for gpu in _GPUS if gpu.name == name), None)
    if memory_gb is not None:
        return Gpu(name, memory_gb * 1e9, known.pcie_bytes_per_s if known else _PCIE_4)
    if known is None:
        raise ConfigError(
            f"{where}: GPU {name!r} is not known, so neither is its memory; give --gpu-memory-gb. Known: "
            + ", ".join(gpu.name for gpu in _GPUS)
        )
    return known

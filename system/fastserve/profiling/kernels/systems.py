"""A machine as aiconfigurator's `systems/<gpu>.yaml` describes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastserve.core.errors import ConfigError
from fastserve.latency.communication import StageLink
from fastserve.latency.gpus import Gpu


@dataclass(frozen=True, slots=True)
class System:
    """Bandwidths in bytes/s, latencies in seconds."""

    path: Path
    memory_bytes: float
    memory_bandwidth: float
    bandwidth_factor: float
    """What is achieved of it."""
    operation_latency_s: float
    """Of an element-wise operation, beside its memory traffic."""
    pcie_bandwidth: float
    gpus_per_node: int
    within_node_bandwidth: float
    between_nodes_bandwidth: float
    send_latency_s: float
    nccl_version: str

    def element_wise_s(self, num_bytes: float) -> float:
        """Seconds of an operation that moves so many bytes, estimated: these tables hold none."""
        return self.operation_latency_s + num_bytes / (self.memory_bandwidth * self.bandwidth_factor)

    def gpu(self, name: str, memory_gb: float | None) -> Gpu:
        """The GPU, with `memory_gb` in 1e9 bytes instead of the file's if given."""
        memory = self.memory_bytes if memory_gb is None else memory_gb * 1e9
        return Gpu(name, memory, self.pcie_bandwidth)

    def stage_link(self, num_gpus: int, bytes_per_token: int) -> StageLink:
        """Between two stages of a model on so many GPUs: within a node if they fit one."""
        within = num_gpus <= self.gpus_per_node
        bandwidth = self.within_node_bandwidth if within else self.between_nodes_bandwidth
        return StageLink(self.send_latency_s, bandwidth, bytes_per_token)


def read_system(path: Path) -> System:
    """Read the file. ConfigError if it is missing, or lacks a number."""
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist, so GPU {path.stem!r} is unknown; give a folder inside aiconfigurator's systems "
            "folder, as aiconfigurator:PATH/systems/data/a100_sxm/vllm/0.14.0"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None

    def number(section: str, key: str) -> float:
        value = _value(path, content, section, key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigError(f"{path}: {section}.{key} is {value!r}; it must be a number above 0")
        return float(value)

    return System(
        path=path,
        memory_bytes=number("gpu", "mem_capacity"),
        memory_bandwidth=number("gpu", "mem_bw"),
        bandwidth_factor=number("gpu", "mem_bw_empirical_scaling_factor"),
        operation_latency_s=number("gpu", "mem_empirical_constant_latency"),
        pcie_bandwidth=number("node", "pcie_bw"),
        gpus_per_node=int(number("node", "num_gpus_per_node")),
        within_node_bandwidth=number("node", "intra_node_bw"),
        between_nodes_bandwidth=number("node", "inter_node_bw"),
        send_latency_s=number("node", "p2p_latency"),
        nccl_version=str(_value(path, content, "misc", "nccl_version")),
    )


def _value(path: Path, content: Any, section: str, key: str) -> Any:
    within = content.get(section) if isinstance(content, dict) else None
    if not isinstance(within, dict) or key not in within:
        raise ConfigError(f"{path} has no {section}.{key}; take the file as aiconfigurator 0.8.0 has it")
    return within[key]

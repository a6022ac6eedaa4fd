"""meta.json: the provenance of a run or another measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import fastserve
from fastserve.core.compiled import core
from fastserve.core.request import RequestStatus
from harness.run.outcome import Outcome
from harness.workload.workload import Workload

_PACKAGES = ("aiohttp", "numpy", "pyarrow", "torch", "transformers", "triton")
COMMIT_VARIABLE = "FASTSERVE_COMMIT"
"""Environment variable with the commit, for a copy of the code without a checkout; it takes precedence."""


def run_meta(
    config: dict[str, Any], workload: Workload, outcome: Outcome, error: BaseException | None
) -> dict[str, Any]:
    """Make the content of a run's meta.json.

    It has commit, versions, core, hardware, the resolved configuration, the digest of the workload, the first reasons
    why requests did not finish, and the error that ended the run early, if any.
    """
    return {
        **environment_meta(),
        "configuration": config,
        "trace": {"description": workload.description, "digest": workload.digest},
        "rejected": outcome.reasons(RequestStatus.REJECTED),
        "failed": outcome.reasons(RequestStatus.FAILED, RequestStatus.ABORTED),
        "error": None if error is None else str(error) or "interrupted",
    }


def environment_meta() -> dict[str, Any]:
    """Commit, date, versions, core and hardware: the provenance of any measurement on this machine."""
    return {
        "commit": _commit(),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "core": core(),
        "hardware": _hardware(),
    }


@cache
def _commit() -> str | None:
    """The commit of this code, with `-dirty` if files differ from it; None if it is unknown.

    Git knows the commit of a checkout; an installed package holds the commit it was built from.
    """
    return os.environ.get(COMMIT_VARIABLE) or _commit_of_checkout(Path(__file__).resolve()) or _commit_of_build()


def _commit_of_checkout(file: Path) -> str | None:
    """The commit of the git repository that holds `file`; None if git does not track the file.

    An installed package may lie inside another project's repository, whose commit is not the package's.
    """
    git = ["git", "-C", str(file.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True, timeout=10, check=True)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--match="],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def _commit_of_build() -> str | None:
    """The commit that setup.py wrote into the package; None without one."""
    try:
        return (files("harness") / "COMMIT").read_text(encoding="utf-8").strip()
    except OSError:
        return None


@cache
def _versions() -> dict[str, str]:
    versions = {"fastserve-repro": fastserve.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _hardware() -> dict[str, Any]:
    hardware: dict[str, Any] = {"machine": platform.machine(), "cores": os.cpu_count(), "cpu": _cpu_model()}
    torch = sys.modules.get("torch")  # A simulation does not import it, and does not depend on its hardware.
    if torch is not None:
        hardware["torch_threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            hardware["gpu"] = torch.cuda.get_device_name()
    return hardware


@cache
def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()

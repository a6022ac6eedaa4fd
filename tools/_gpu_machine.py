"""The machine of a session: commit, versions, hardware, and its GPU."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from typing import Any

from _gpu_steps import ROOT

from fastserve.core.errors import ConfigError

_ASK_THE_MACHINE = """
import json, sys
try:
    import torch
except ImportError:
    sys.exit("no torch")
from harness.run.meta import environment_meta
device = torch.device(sys.argv[1])
found = {"torch": torch.__version__, "device": device.type, **environment_meta()}
if device.type == "cuda":
    found["device"] = torch.cuda.get_device_name(device) if torch.cuda.is_available() else None
print(json.dumps(found))
"""


def machine_of(device: str) -> dict[str, Any]:
    """Find commit, versions, hardware, the device's name, and what nvidia-smi says of it.

    A separate process asks torch, since a process that has used a GPU keeps memory on it. Raises ConfigError if torch
    or the device is missing.
    """
    asked = subprocess.run(
        [sys.executable, "-c", _ASK_THE_MACHINE, device], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if "no torch" in asked.stderr:
        raise ConfigError(f"{sys.executable} has no torch; name a Python that has: make gpu PYTHON=...")
    if asked.returncode:
        raise ConfigError(f"cannot ask torch for --device {device}: {asked.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    if found["device"] is None:
        raise ConfigError(
            f"--device {device}: torch {found['torch']} sees no GPU here; run this on a machine that has one, or try "
            "it on the CPU with --dry-run"
        )
    if found["device"] != "cpu":
        query = "name,driver_version,memory.total,power.limit,clocks.max.sm,pcie.link.gen.max,pcie.link.width.max"
        with contextlib.suppress(OSError):
            told = subprocess.run(
                ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
            found["nvidia_smi"] = dict(zip(query.split(","), told.stdout.strip().split(", "), strict=False))
    return found

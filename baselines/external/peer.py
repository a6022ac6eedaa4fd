"""Run another simulator or scheduler in a process of its own: requests go by a CSV file, the answer is JSON."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.core.errors import ConfigError

LAST_LINES = 10

Answer = dict[str, Any]


def write_request_file(path: Path, prompt_tokens: np.ndarray, output_tokens: np.ndarray, arrival_s: np.ndarray) -> None:
    """Write the request file, arrivals exact in binary; each array [num_requests]."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("prompt_tokens", "output_tokens", "arrival_s"))
        writer.writerows(zip(prompt_tokens.tolist(), output_tokens.tolist(), arrival_s.tolist(), strict=True))


def answer_of(command: Sequence[str | Path], environment: Mapping[str, str], name: str, case: str = "") -> Answer:
    """Run the command and read the last line it prints. ConfigError with its last lines of stderr if it fails."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "".join(f"\n  {line}" for line in done.stderr.splitlines()[-LAST_LINES:])
        raise ConfigError(f"{name} ended with status {done.returncode}{case}:{last}")
    answer: Answer = json.loads(done.stdout.splitlines()[-1])
    return answer

"""Clients of other projects, which live in an environment of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

ENVIRONMENT = Path(__file__).parents[2] / ".venv-clients"
"""What `make clients` makes of requirements-clients.txt."""


def command_of(name: str) -> Path:
    """A client's command in that environment; skips the test where it is not installed."""
    command = ENVIRONMENT / "bin" / name
    if not command.exists():
        pytest.skip(f"{name} is not installed; `make clients` does it, into {ENVIRONMENT.name}")
    return command

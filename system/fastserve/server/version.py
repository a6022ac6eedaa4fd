"""The version of this software."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def software_version() -> str:
    """Of the installed package; 0 for a checkout that is on the path but not installed."""
    try:
        return version("fastserve-repro")
    except PackageNotFoundError:
        return "0"

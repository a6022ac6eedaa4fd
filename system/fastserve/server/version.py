"""The version of this software."""

from __future__ import annotations

import fastserve


def software_version() -> str:
    """The code's own, whether it is installed or on the path."""
    return fastserve.__version__

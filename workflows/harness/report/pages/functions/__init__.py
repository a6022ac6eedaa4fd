"""What the template of a page may call. Each function gives text out of tables; none holds a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from harness.report.pages.functions.claims import ClaimFunctions
from harness.report.pages.functions.fidelity import FidelityFunctions
from harness.report.pages.functions.loads import LoadFunctions
from harness.report.pages.functions.measures import MeasureFunctions
from harness.report.pages.source import Source

KINDS = (ClaimFunctions, LoadFunctions, MeasureFunctions, FidelityFunctions)


def functions_on(source: Source) -> Mapping[str, Callable[..., Any]]:
    """The public methods of all kinds, by the names that templates use."""
    kinds = [kind(source) for kind in KINDS]
    return {name: getattr(kind, name) for kind in kinds for name in dir(kind) if not name.startswith("_")}

"""A run and the range its profile was measured in: keys of summary.json and meta.json, and a warning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from fastserve.latency import MeasuredRange, OutsideRange

NOT_KNOWN = "range not known"
SHARE = "outside_profile_range"
"""Key of summary.json: the share of the computed time outside the range; null if the range is not known."""
BOUNDS_LEFT = "profile_bounds_left"
"""Key of summary.json: the bounds that were left, each with `measured` and `reached`; null as above."""


def range_summary(outside: OutsideRange | None) -> dict[str, Any]:
    """Keys of summary.json; None: the range is not known."""
    return {
        SHARE: None if outside is None else outside.share,
        BOUNDS_LEFT: None if outside is None else dict(outside.bounds_left),
    }


def range_meta(measured: MeasuredRange | None) -> dict[str, Any]:
    """Keys of meta.json."""
    return {"profile_range": NOT_KNOWN if measured is None else asdict(measured)}


def range_warning(summaries: Iterable[Mapping[str, Any]], profile: str | None) -> str:
    """Warn that a run left the profile's range, of several the one with the largest share; empty if none did."""
    outside = [OutsideRange(each[SHARE], each[BOUNDS_LEFT]) for each in summaries if each.get(SHARE)]
    return max(outside, key=lambda each: each.share).warning(profile or "") if outside else ""

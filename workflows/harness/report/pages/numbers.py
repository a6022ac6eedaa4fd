"""How numbers are written on a page: few digits, intervals, per cents, tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from fastserve.core.errors import ConfigError


def short(value: Any) -> str:
    """Write a number with at most three digits: 0.99, 2.60, 16.9, 146, 1,155, and 0.0375. A missing one is empty."""
    if value is None or pd.isna(value):
        return ""
    number = float(value)
    size = abs(number)
    if size >= 99.95:
        return f"{number:,.0f}"
    if size >= 9.995:
        return f"{number:.1f}"
    return f"{number:.2f}" if size >= 0.0995 else f"{number:.3g}"


def with_interval(value: Any, low: Any, high: Any) -> str:
    """Write a value and its interval: "2.60 (2.54 to 2.66)".

    An end beyond the measured range is left out: "1.03 (from 1.01)". So is a value: "more than 1.12", "less than 4";
    without any bound the text is empty.
    """
    said = interval(low, high)
    if value is None or pd.isna(value):
        return said.replace("from", "more than").replace("up to", "less than") if said[:1] in ("f", "u") else ""
    return f"{short(value)} ({said})" if said else short(value)


def interval(low: Any, high: Any) -> str:
    """Write an interval: "2.54 to 2.66", "from 2.54", "up to 2.66"; empty if it is unknown or open on both sides."""
    if low is None or high is None or pd.isna(low) or pd.isna(high):
        return ""
    is_open_below = math.isinf(low) or low == 0  # A ratio or a load is above 0 in any case.
    if math.isinf(high):
        return "" if is_open_below else f"from {short(low)}"
    if is_open_below:
        return f"up to {short(high)}"
    return f"{short(low)} to {short(high)}"


def claimed(low: Any, high: Any) -> str:
    """Write what a paper claims, with the digits that it gives: "2.03", "1.46 to 1.64"; empty for nothing."""
    if pd.isna(low):
        return ""
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"


def percent(share: Any) -> str:
    """Write a relative difference: 0.276 as "+28 %"; a missing one is empty."""
    if share is None or pd.isna(share):
        return ""
    rounded = round(100 * float(share))
    return f"{rounded:+d} %" if rounded else "0 %"


def unsigned(text: str) -> str:
    """A per cent without its sign: "+28 %" as "28 %"."""
    return text.lstrip("+-")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown, without a line break at its end. Raises ConfigError without rows."""
    if not rows:
        raise ConfigError("the table has no rows")
    lines = [header, ["---"] * len(header), *rows]
    return (
        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        .replace("| --- ", "|---")
        .replace("|--- |", "|---|")
    )


def without_empty_columns(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The table without columns that are empty in every row."""
    kept = [i for i in range(len(header)) if any(line[i] for line in lines)]
    return markdown([header[i] for i in kept], [[line[i] for i in kept] for line in lines])

"""The table of claims as a self-contained HTML page."""

from __future__ import annotations

from html import escape
from typing import Any

import pandas as pd

from harness.report.captions import claimed, three_digits

_TITLES = {
    "paper": "Claims of the paper",
    "suspicion": "What the paper's numbers and its released code made us suspect, tested",
    "beyond": "Beyond the paper",
}
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#222;margin:2em auto;max-width:75em;padding:0 1em}
table{border-collapse:collapse;width:100%;margin-bottom:2em}
th,td{text-align:left;vertical-align:top;padding:.45em .7em;border-bottom:1px solid #ddd}
th{border-bottom:2px solid #888}td.n{white-space:nowrap;text-align:right;font-variant-numeric:tabular-nums}
span{padding:.1em .5em;border-radius:.3em;white-space:nowrap}
.reproduced{background:#cfe8fb}.partly{background:#fbeec2}.not{background:#f7d3c4}.found,.cannot{background:#e8e8e8}
small{color:#666}
"""


def claims_page(claims: pd.DataFrame) -> str:
    """Write the table of `harness.analysis.claims.claims_table` as HTML, with a section for each group."""
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>Claims</title><style>{_STYLE}</style><body>"]
    for group, rows in claims.groupby("group", sort=False):
        parts.append(
            f"<h2>{escape(_TITLES[str(group)])}</h2><table><tr><th>Claim<th>Paper<th>Ours (95 %)<th>Difference"
        )
        parts.append("<th>Verdict<th>Reason")
        parts += [_row(row) for row in rows.itertuples()]
        parts.append("</table>")
    return "".join(parts) + "\n"


def _row(row: Any) -> str:
    interval = f"<br><small>{three_digits(row.low)} to {three_digits(row.high)}</small>" if pd.notna(row.low) else ""
    difference = f"{100 * row.relative_difference:+.0f} %" if pd.notna(row.relative_difference) else ""
    css = row.verdict.partition(" ")[0]
    reason = escape(row.reason) if isinstance(row.reason, str) else ""
    return (
        f"<tr><td>{escape(row.claim)}<br><small>{escape(row.source)}</small><td class=n>{claimed(row)}"
        f"<td class=n>{three_digits(row.value)}{interval}<td class=n>{difference}"
        f"<td><span class={css}>{escape(row.verdict)}</span><td>{reason}"
    )

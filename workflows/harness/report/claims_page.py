"""The table of claims as a self-contained HTML page."""

from __future__ import annotations

from html import escape
from typing import Any

import pandas as pd

from harness.report.captions import claimed, false_alarms, span, three_digits

_TITLES = {
    "paper": "Claims of the paper",
    "inconsistency": "The authors' own numbers against each other",
    "suspicion": "What the paper's numbers and its released code made us suspect, tested",
    "beyond": "Beyond the paper",
}
_HEADINGS = (
    "Claim",
    "Paper",
    "Authors' rerun",
    "Ours (95 %)",
    "One sample (95 %)",
    "Effect retained",
    "q",
    "Verdict",
    "Reason",
)
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#222;margin:2em auto;max-width:75em;padding:0 1em}
table{border-collapse:collapse;width:100%;margin-bottom:2em}
th,td{text-align:left;vertical-align:top;padding:.45em .7em;border-bottom:1px solid #ddd}
th{border-bottom:2px solid #888}td.n{white-space:nowrap;text-align:right;font-variant-numeric:tabular-nums}
span{padding:.1em .5em;border-radius:.3em;white-space:nowrap}
.consistent{background:#c9ecdf}.attenuated{background:#fbe6c2}.inflated{background:#d5ecfa}.direction{background:#f3dfeb}
.contradicted{background:#f7d3c4}.untestable,.found{background:#e8e8e8}
small{color:#666}
"""


def claims_page(claims: pd.DataFrame, itself: pd.DataFrame) -> str:
    """Write the table of `harness.analysis.claims.claims_table` as HTML, with a section for each group.

    Below it stands how often series differ from themselves (`harness.analysis.against_itself.shares`).
    """
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>Claims</title><style>{_STYLE}</style><body>"]
    for group, rows in claims.groupby("group", sort=False):
        parts.append("<h2>{}</h2><table><tr>{}".format(escape(_TITLES[str(group)]), "<th>".join(["", *_HEADINGS])))
        parts += [_row(row) for row in rows.itertuples()]
        parts.append("</table>")
    if alarms := false_alarms(itself):
        parts += ["<h2>How often a difference is shown where none is</h2>", *(f"<p>{escape(line)}" for line in alarms)]
    return "".join(parts) + "\n"


def _row(row: Any) -> str:
    css = row.verdict.partition(" ")[0]
    reason = escape(row.reason) if isinstance(row.reason, str) else ""
    if isinstance(row.tuned, str):
        reason = f"<b>Tuned on these points: {escape(row.tuned)}.</b> {reason}"
    retained = f"{100 * row.retained_effect:.0f} %" if pd.notna(row.retained_effect) else ""
    return (
        f"<tr><td>{escape(row.claim)}<br><small>{escape(row.source)}</small><td class=n>{claimed(row)}"
        f"<td class=n>{three_digits(row.rerun)}<td class=n>{three_digits(row.value)}{_small(row.low, row.high)}"
        f"<td class=n>{span(row.sample_low, row.sample_high)}<td class=n>{retained}"
        f"<td class=n>{three_digits(row.q_value)}<td><span class={css}>{escape(row.verdict)}</span><td>{reason}"
    )


def _small(low: float, high: float) -> str:
    return f"<br><small>{span(low, high)}</small>" if pd.notna(low) else ""

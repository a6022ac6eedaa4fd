"""What other policies would have done with the measured requests on that machine: simulated, beside the real run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from harness.experiments.experiment import Experiment
from harness.studies.measured.errors import metric_name, milliseconds
from harness.studies.measured.replay import replays_of
from harness.studies.measured.table import QUANTITIES, read_requests, statistic_of, with_quantities

METRICS = tuple(f"{statistic}_{quantity}" for quantity in QUANTITIES for statistic in ("mean", "p99"))
"""What policies are compared by."""
COLUMNS = ("run", "gpu", "series", "label", "policy", "metric", "simulated", "measured", "over_vllm", "error", "beyond")


def policies_table(experiment: Experiment, points: pd.DataFrame) -> pd.DataFrame:
    """A row for each run, series and metric, in seconds or seconds a token.

    - `measured`: of the real engine, whatever the series;
    - `over_vllm`: simulated, over what the series that repeats the real run has in simulation;
    - `error`: of that series, (simulated - measured) / measured: how far the simulator is off in this metric;
    - `beyond`: whether the policy differs from that series by more than this error ("yes" or "no"; empty for itself).

    `points` is the experiment's table of points. The error is known for one policy: those that swap also rest on the
    profile's host link, which no run has measured.
    """
    rows = []
    for point, measured in replays_of(experiment):
        real = with_quantities(read_requests(measured))
        own: Any = points[points["panel"] == point.panel].set_index("series")
        for metric in METRICS:
            truth, repeated = statistic_of(real, metric), float(own.loc[point.series, metric])
            error = repeated / truth - 1
            for series in own.index:
                value = float(own.loc[series, metric])
                differs = abs(value / repeated - 1) > abs(error)
                rows.append(
                    {
                        "run": measured.name,
                        "gpu": measured.gpu.partition(",")[0],
                        "series": series,
                        "label": own.loc[series, "label"],
                        "policy": own.loc[series, "policy"],
                        "metric": metric,
                        "simulated": value,
                        "measured": truth,
                        "over_vllm": value / repeated,
                        "error": error,
                        "beyond": "" if series == point.series else "yes" if differs else "no",
                    }
                )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def describe_policies(table: pd.DataFrame) -> list[str]:
    """A line for each GPU: how many differences from vLLM are beyond the simulator's error, and whose are not."""
    lines = []
    for gpu, rows in table[table["beyond"] != ""].groupby("gpu", sort=False):
        within = rows[rows["beyond"] == "no"]
        line = (
            f"{gpu}: {len(rows) - len(within)} of {len(rows)} differences between a policy and vLLM are larger than "
            "the simulator's error"
        )
        if len(within):
            counts = within["label"].value_counts(sort=False)
            named = [f"{label} ({count} of {len(METRICS)} metrics)" for label, count in counts.items()]
            line += f"; not: {', '.join(named)}"
        lines.append(line)
    return lines


def policies_page(table: pd.DataFrame, metrics: Sequence[str] = METRICS) -> str:
    """The table in Markdown, times in ms. A simulated value within the simulator's error of vLLM's has a ≈."""
    lines = [
        f"| GPU | | {' | '.join(map(metric_name, metrics))} |",
        f"|---|---|{'---|' * len(metrics)}",
    ]
    for gpu, rows in table.groupby("gpu", sort=False):
        truth = rows.drop_duplicates("metric").set_index("metric")["measured"]
        cells = " | ".join(milliseconds(truth[metric]) for metric in metrics)
        lines.append(f"| {gpu} | **vLLM, measured** | {cells} |")
        for label, of_series in rows.groupby("label", sort=False):
            own: Any = of_series.set_index("metric")
            cells = " | ".join(
                ("≈ " if own.loc[metric, "beyond"] == "no" else "") + milliseconds(own.loc[metric, "simulated"])
                for metric in metrics
            )
            lines.append(f"| {gpu} | {label}, simulated | {cells} |")
    return "\n".join(lines) + "\n"

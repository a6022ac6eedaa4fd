"""Reading a written timeline."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any


def threads_of(events: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Spans in order of time, by the names of their process and thread."""
    names: dict[tuple[int, int], str] = {}
    spans = defaultdict(list)
    for event in events:
        if event["name"] in ("process_name", "thread_name"):
            names[event["pid"], event["tid"]] = event["args"]["name"]
        elif event["ph"] == "X":
            spans[event["pid"], event["tid"]].append(event)
    return {(names[pid, 0], names[pid, tid]): sorted(of, key=lambda e: e["ts"]) for (pid, tid), of in spans.items()}

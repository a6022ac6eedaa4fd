"""The naive multi-level feedback queue of the paper's ablation: nothing is known, not even prompt lengths."""

from __future__ import annotations

from fastserve.request import Request
from fastserve.scheduler import register
from fastserve.scheduler.skip_join_mlfq import SkipJoinMLFQ


@register
class MLFQ(SkipJoinMLFQ):
    """FastServe without skip-join: every request joins the highest queue.

    A long prompt overruns the short quantum there, delays those behind it, and is demoted after one iteration.
    """

    name = "mlfq"

    def entry_level(self, request: Request) -> int:
        """The highest."""
        return 0

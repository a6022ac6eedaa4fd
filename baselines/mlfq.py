"""The naive multi-level feedback queue of the paper's ablation: nothing is known, not even prompt lengths."""

from __future__ import annotations

from fastserve.core.request import Request
from fastserve.policies.skip_join_mlfq import SkipJoinMLFQ
from fastserve.scheduler import register


@register
class MLFQ(SkipJoinMLFQ):
    """FastServe without skip-join: every request joins the highest queue.

    A long prompt overruns the short quantum there, delays those behind it, and is demoted after one iteration.
    """

    name = "mlfq"

    def entry_level(self, request: Request) -> int:
        """The highest queue."""
        return 0

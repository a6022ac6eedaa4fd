"""Find the ranks that hang: a rank that waits for another looks different from one that stands still."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastserve.runtime.executors.ranks.peer import Peer


class Fault(NamedTuple):
    """Ranks that are the cause of a failure, and what is known of it."""

    peers: Sequence[Peer]
    what: str
    guess: str = ""

    def __str__(self) -> str:
        first, *others = self.peers
        also = f" (and so for rank {', '.join(str(peer.rank) for peer in others)})" if others else ""
        reason = f": {self.guess}" if self.guess else ""
        return f"{first} {self.what}{also}{reason}; the engine has ended, start another"


def find_hanging(peers: Sequence[Peer], now: float, since: float, timeout_s: float) -> Fault | None:
    """The ranks that were silent or made no progress for `timeout_s`; None if there are none.

    `since`: when the ranks were given work; times in seconds on the monotonic clock. Ranks that wait for others are at
    fault only if all busy ranks wait.
    """
    if now - since < timeout_s:
        return None
    silent = [peer for peer in peers if now - max(peer.last_heard, since) > timeout_s]
    if silent:
        return Fault(silent, f"has sent nothing for {timeout_s:g} s", "it hangs, or its machine cannot be reached")
    busy = [peer for peer in peers if peer.busy]
    still = [peer for peer in busy if now - max(peer.last_progress, since) > timeout_s]
    stuck = [peer for peer in still if not peer.waiting_for]
    if stuck:
        return Fault(stuck, f"has computed nothing for {timeout_s:g} s", "it hangs")
    if still and len(still) == len(busy):
        return Fault(still, f"has waited for {still[0].waiting_for} for {timeout_s:g} s", "no rank computes")
    return None

"""Whether other programs leave a measurement the processors that it needs: before it begins, and while it lasts.

On a processor that is shared, a run takes longer than its own work, and queueing delays multiply the difference. What
is measured then is the other programs. So a measurement refuses to begin on such a machine, and to end with a result.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time

import psutil

from fastserve.core.errors import FastServeError

LEAST_SHARE = 0.9
"""Share of the needed processors that must be left to a measurement, unless it says otherwise."""
PROBE_S = 2.0
"""Seconds of a probe: long against a time slice of the scheduler."""
PROBES = 3
"""Probes, with pauses of the same length: the jobs before this one may be ending still."""
WINDOW_S = 5.0
"""Seconds over which a watch averages: long enough that housekeeping of the system does not count."""
_SPIN = """
import sys, time
wall, processor, seconds = time.perf_counter(), time.process_time(), float(sys.argv[1])
while time.perf_counter() - wall < seconds:
    pass
print((time.process_time() - processor) / (time.perf_counter() - wall))
"""


class BusyMachineError(FastServeError):
    """Other programs keep the processors busy that a measurement needs."""


def available_processors() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine_busy_s() -> float:
    """Processor seconds that all programs of this machine have taken; those that its host took from it count too."""
    times = psutil.cpu_times()
    idle_s = times.idle + getattr(times, "iowait", 0.0)
    # `user` and `nice` include the time of guests.
    return float(sum(times) - idle_s - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0))


def own_busy_s() -> float:
    """Processor seconds of this process and of all that it has started, those that have ended included."""
    process = psutil.Process()
    seconds = 0.0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # It has ended meanwhile.
            times = each.cpu_times()
            seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


class Watch:
    """Tells, each time it looks, what share of `needed` processors other programs have left since it looked last."""

    def __init__(self, needed: int, least_share: float) -> None:
        self.needed = needed
        self.least_share = least_share
        self.lowest = 1.0
        """The lowest share seen so far."""
        self._last = self._read()

    def look(self) -> None:
        """Look if the last time is `WINDOW_S` ago. Raises BusyMachineError if the share is below `least_share`."""
        if time.perf_counter() - self._last[0] >= WINDOW_S:
            self.look_now()

    def look_now(self) -> float:
        """Look at once and return the share. Raises BusyMachineError if it is below `least_share`."""
        now = self._read()
        wall_s, busy_s, own_s = (after - before for after, before in zip(now, self._last, strict=True))
        self._last = now
        share = share_left(max(0.0, busy_s - own_s) / wall_s, self.needed)
        self.lowest = min(self.lowest, share)
        check_share(share, self.needed, self.least_share, f"during {wall_s:.0f} s of the measurement")
        return share

    @staticmethod
    def _read() -> tuple[float, float, float]:
        return time.perf_counter(), machine_busy_s(), own_busy_s()


def share_left(others: float, needed: int) -> float:
    """Share of `needed` processors that is left if other programs keep `others` processors of the machine busy."""
    left = min(available_processors(), (os.cpu_count() or 1) - others)
    return min(1.0, max(0.0, left / needed))


def probe(needed: int) -> float:
    """Keep `needed` processors busy for `PROBE_S` seconds, and return the share of them that was to be had."""
    command = [sys.executable, "-S", "-E", "-c", _SPIN, str(PROBE_S)]
    spinning = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(needed)]
    return statistics.mean(float(each.communicate()[0]) for each in spinning)


def require_processors(needed: int, least_share: float) -> None:
    """Raise BusyMachineError if a few probes all get less than `least_share` of `needed` processors."""
    share = 0.0
    for i in range(PROBES):
        time.sleep(PROBE_S if i else 0.0)
        share = probe(needed)
        if share >= least_share:
            return
    check_share(share, needed, least_share, "before the measurement")


def check_share(share: float, needed: int, least_share: float, when: str) -> None:
    """Raise BusyMachineError, with value, bound and remedy, if a share of processors is too small to measure."""
    if share < least_share:
        raise BusyMachineError(
            f"this machine is too busy to measure: {when} other programs left {share:.1%} of the {needed} processors "
            f"that it needs, and at least {least_share:.0%} must be left; nothing is reported. Stop the other programs "
            f"(top shows them; now: {', '.join(busiest()) or 'none'}) and run the same command again"
        )


def busiest(most: int = 3, seconds: float = 0.5) -> list[str]:
    """Name the programs that keep a tenth of a processor or more busy, this one and its own left out: name and id."""
    process = psutil.Process()
    own = {process, *process.children(recursive=True)}
    others = [each for each in psutil.process_iter() if each not in own]
    shares: dict[psutil.Process, float] = {}
    for pause in (0.0, seconds):
        time.sleep(pause)
        for each in others:
            with contextlib.suppress(psutil.Error):
                shares[each] = each.cpu_percent()  # Since the last call; 0 in the first.
    names = []
    for each in sorted(shares, key=lambda each: -shares[each])[:most]:
        with contextlib.suppress(psutil.Error):
            if shares[each] >= 10:
                names.append(f"{each.name()} (process {each.pid}, {shares[each]:.0f} %)")
    return names

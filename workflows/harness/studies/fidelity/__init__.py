"""The simulator against the real engine of this machine, on the same workloads.

The speed of a shared machine drifts by 10 % and more within a second, and queueing delays multiply the drift. A profile
measured before a run would therefore show the machine's other load, not the simulator's error. So all real runs and the
profiler take turns of a few iterations, and an engine's clock stands still outside its turn: all see the same machine.

All runs share one model, since copies of the same weights differ in speed by their place in memory. The profile stays
independent of the runs: the profiler has its own worker and times iterations of other shapes.

Engines of several ranks take turns too. Each run, and the profiler, has its own ranks. They are stopped (SIGSTOP)
together with the engine's clock when a turn ends, even in the middle of an iteration.

Turns cannot undo what other programs take: on a busy machine the study refuses to begin, or to give a result.
"""

from harness.studies.fidelity.comparison import METRICS
from harness.studies.fidelity.study import measure_fidelity

__all__ = ["METRICS", "measure_fidelity"]

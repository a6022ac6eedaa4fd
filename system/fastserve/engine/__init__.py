"""The engine: its loop, what it records, and the interface of what executes its iterations."""

from fastserve.engine.arrivals import Arrival
from fastserve.engine.engine import NO_LOGPROBS, Engine
from fastserve.engine.executor import Executor, FinishedTransfer
from fastserve.engine.iteration_log import IterationLog
from fastserve.engine.job import Job
from fastserve.engine.observer import EngineView, Observer, Observers
from fastserve.engine.recorder import Recorder
from fastserve.engine.records import IterationRecord, RequestMetrics
from fastserve.engine.timeline import Timeline

__all__ = [
    "NO_LOGPROBS",
    "Arrival",
    "Engine",
    "EngineView",
    "Executor",
    "FinishedTransfer",
    "IterationLog",
    "IterationRecord",
    "Job",
    "Observer",
    "Observers",
    "Recorder",
    "RequestMetrics",
    "Timeline",
]

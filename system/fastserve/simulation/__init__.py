"""A simulated engine: in virtual time, or in real time behind a server. Imports no torch."""

from fastserve.simulation.build import simulated_engine
from fastserve.simulation.executor import SimulatedExecutor
from fastserve.simulation.range_guard import RangeGuard

__all__ = ["RangeGuard", "SimulatedExecutor", "simulated_engine"]

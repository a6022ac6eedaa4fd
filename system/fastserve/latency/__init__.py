"""How long does an iteration take? Fitted models, the profiles that store them, and the fit to measurements."""

from fastserve.latency.base import LatencyModel, decode_times
from fastserve.latency.communication import AllReduce, HostLink, StageLink, all_reduces, fit_link
from fastserve.latency.engine_time import EngineTime
from fastserve.latency.fitted import DecodeFit, FittedLatency, PrefillCurve, PrefillFit
from fastserve.latency.kernel_latency import KernelLatency
from fastserve.latency.kernel_tables import Curve, KernelTables
from fastserve.latency.measured_range import MeasuredRange
from fastserve.latency.outside_range import OutsideRange
from fastserve.latency.pipelined import PipelinedLatency
from fastserve.latency.profile import Profile, list_profiles, load_profile

__all__ = [
    "AllReduce",
    "Curve",
    "DecodeFit",
    "EngineTime",
    "FittedLatency",
    "HostLink",
    "KernelLatency",
    "KernelTables",
    "LatencyModel",
    "MeasuredRange",
    "OutsideRange",
    "PipelinedLatency",
    "PrefillCurve",
    "PrefillFit",
    "Profile",
    "StageLink",
    "all_reduces",
    "decode_times",
    "fit_link",
    "list_profiles",
    "load_profile",
]

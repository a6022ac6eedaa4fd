"""How long will an iteration take? Fitted models, the profiles that store them, and the profiler that measures them."""

from fastserve.latency.base import LatencyModel, decode_times
from fastserve.latency.fitted import DecodeFit, FittedLatency, PrefillCurve, PrefillFit
from fastserve.latency.pipelined import PipelinedLatency, StageLink
from fastserve.latency.profile import HostLink, Profile, list_profiles, load_profile

__all__ = [
    "DecodeFit",
    "FittedLatency",
    "HostLink",
    "LatencyModel",
    "PipelinedLatency",
    "PrefillCurve",
    "PrefillFit",
    "Profile",
    "StageLink",
    "decode_times",
    "list_profiles",
    "load_profile",
]

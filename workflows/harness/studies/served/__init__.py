"""Servers side by side: ours under several policies and vLLM's own, with the same model, driven by the same client.

All servers are started one after the other and then wait, stopped (SIGSTOP), so that they take no processor time. They
take turns, point by point and seed by seed: the speed of a shared machine drifts, and turns show each server the same
of it. A seed is one set of requests, the same for all servers.
"""

from harness.studies.served.study import COMPARED, compared_with_first, measure_served

__all__ = ["COMPARED", "compared_with_first", "measure_served"]

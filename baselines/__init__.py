"""Baseline policies, one file each, on the same interfaces as FastServe's own."""

from baselines import fastserve_artifact, fixed_priority, mlfq, orca, run_to_completion, srpt, vllm, vllm_chunked

__all__ = [
    "fastserve_artifact",
    "fixed_priority",
    "mlfq",
    "orca",
    "run_to_completion",
    "srpt",
    "vllm",
    "vllm_chunked",
]

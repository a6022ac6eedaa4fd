"""Baseline policies, one file each, on the same interfaces as FastServe's own."""

from baselines import vllm

__all__ = ["vllm"]

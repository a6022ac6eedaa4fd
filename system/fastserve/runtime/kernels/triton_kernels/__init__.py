"""Kernels in Triton, for GPUs; see `fastserve.runtime.kernels.Kernels`."""

from fastserve.runtime.kernels.triton_kernels.attention import paged_attention
from fastserve.runtime.kernels.triton_kernels.elementwise import rotate, silu_mul
from fastserve.runtime.kernels.triton_kernels.host_exchange import exchange, load_decodes
from fastserve.runtime.kernels.triton_kernels.kv_store import store_kv
from fastserve.runtime.kernels.triton_kernels.norm import add_norm

__all__ = ["add_norm", "exchange", "load_decodes", "loops_on_host", "paged_attention", "rotate", "silu_mul", "store_kv"]

loops_on_host = False

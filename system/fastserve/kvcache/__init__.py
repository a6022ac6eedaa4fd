"""Bookkeeping of the paged KV cache: which blocks each request owns, and where. Tensors live in the worker."""

from fastserve.core.request import Location
from fastserve.kvcache.block_pool import BlockPool
from fastserve.kvcache.errors import CacheError
from fastserve.kvcache.manager import Direction, KVCacheManager, Transfer

__all__ = ["BlockPool", "CacheError", "Direction", "KVCacheManager", "Location", "Transfer"]

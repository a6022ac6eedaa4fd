"""Worker: a model or a part of it, its KV pools, and the copies between them."""

from fastserve.runtime.worker.worker import Worker

__all__ = ["Worker"]

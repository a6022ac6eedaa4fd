"""One rank: its model, its KV pools, and the copies between them."""

from fastserve.runtime.worker.worker import Worker

__all__ = ["Worker"]

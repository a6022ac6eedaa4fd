"""What the cache manager refuses. Each is a bug in the caller, never a user's mistake."""


class CacheError(RuntimeError):
    """An operation that would break an invariant of the KV cache."""


class OutOfBlocksError(CacheError):
    """More blocks asked for than are free."""


class WrongLocationError(CacheError):
    """A request's cache is not where the operation needs it."""


class BlockOwnershipError(CacheError):
    """A block freed twice, or owned twice (invariant I2)."""

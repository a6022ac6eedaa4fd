"""What the server says of itself: counters for Prometheus, the engine's state, latencies."""

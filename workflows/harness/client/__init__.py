"""The HTTP client: a workload replayed against any OpenAI-compatible server."""

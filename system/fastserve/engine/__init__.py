"""The engine loop, what it records, and the interface of what executes its decisions."""

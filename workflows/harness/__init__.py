"""The benchmark harness: workloads, replay, metrics, capacity search, plots, and the `fastbench` command."""

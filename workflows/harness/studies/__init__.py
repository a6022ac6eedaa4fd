"""Measurements that compare: the simulator with real engines, recorded GPU runs, servers side by side."""

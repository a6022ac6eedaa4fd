"""Measure a machine and write a profile of it: `fastserve profile`."""

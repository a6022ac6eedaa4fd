"""Measured runs: real engines on real GPUs, recorded by others, and simulations of the same requests beside them.

An experiment with `figure: measured` has a panel for each run, which its trace names (`measured:rtx4090`). The series
that it names under `over` repeats what the real engine did; the others say what other policies would have done there.
"""

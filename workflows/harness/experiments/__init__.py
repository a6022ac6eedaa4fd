"""Experiments: the files that define them, their points, and the batches their runs are carried out in."""

"""The pipeline at work: worker processes, one a core, and the files in which a batch of runs leaves its results."""

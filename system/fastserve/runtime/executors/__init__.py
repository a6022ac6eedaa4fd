"""Executors that compute: by one worker in this process, or by a group of ranks."""

"""One run: its configuration, the backends that serve it, and the files it leaves."""

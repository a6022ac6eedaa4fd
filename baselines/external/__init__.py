"""Other serving systems as baselines: servers from their own environments, driven over HTTP and never imported."""

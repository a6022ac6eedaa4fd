"""HTTP apart from what is served: connections, hosts, keys, bodies, errors, ids, the log."""

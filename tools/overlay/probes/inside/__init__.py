"""The probes themselves, which run inside of another Python: on its standard library alone."""

"""Pull requests to upstream, from the series."""

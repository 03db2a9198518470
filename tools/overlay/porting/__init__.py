"""New releases: found, and the series carried over to them."""

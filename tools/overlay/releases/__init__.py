"""The releases in VERSIONS.toml, and how their files are had from a package index."""

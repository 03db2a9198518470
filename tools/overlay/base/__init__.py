"""Errors, console, git, and how files are written: what knows nothing of releases or patches."""

"""What a release after the newest patched one selects, run from its sources on a faked GPU."""

"""tests/compiled, as far as it needs no release."""

"""Patches against released vLLM tags, and the tooling that applies, builds and tests them."""

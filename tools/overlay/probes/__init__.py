"""Probes: one small assertion of behaviour a topic, and what they say of a vLLM."""

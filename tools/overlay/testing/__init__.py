"""Environments of a release, the tests that run in them, and what their results say."""

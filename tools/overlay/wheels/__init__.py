"""Patched wheels: built from the official ones, verified, described, indexed."""

"""The fixtures of the unit tests: those of the made-up upstream."""

from __future__ import annotations

from made_upstream import bare_upstream, run, templates, upstream

__all__ = ["bare_upstream", "run", "templates", "upstream"]

"""The fixtures of the tests of probes."""

from __future__ import annotations

from .made_llama4 import bad_upstream, llama4_templates, upstream

__all__ = ["bad_upstream", "llama4_templates", "upstream"]

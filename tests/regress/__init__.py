"""Tests of an installed vLLM, stock or patched, that need no GPU and no network.

They use pytest, the standard library, torch and vllm, so that they run in any environment that a
vLLM wheel was installed into. `conftest.py` says how a run is judged.
"""

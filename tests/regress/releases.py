"""The releases these tests know, in order, and which of them is installed."""

from __future__ import annotations

import functools
from importlib import metadata

RELEASES = (
    "0.8.2",
    "0.8.3",
    "0.8.4",
    "0.8.5",
    "0.8.5.post1",
    "0.9.0",
    "0.9.0.1",
    "0.9.1",
    "0.9.2",
    "0.10.0",
    "0.10.1",
    "0.10.1.1",
    "0.10.2",
    "0.11.0",
)

CONTROLS = frozenset({"0.8.2"})
"""The last release before Llama 4: never FAIL_TO_PASS."""


def span(first: str, last: str = RELEASES[-1]) -> frozenset[str]:
    """Return the releases from `first` to `last`, both included."""
    start, stop = RELEASES.index(first), RELEASES.index(last)
    if start > stop:
        raise ValueError(f"{first} is later than {last}")
    return frozenset(RELEASES[start : stop + 1])


def in_order(releases: frozenset[str]) -> list[str]:
    """Return `releases` sorted as they were published."""
    return [release for release in RELEASES if release in releases]


LLAMA4 = span("0.8.3")
"""The releases that have Llama 4."""

WITH_V0 = span("0.8.3", "0.10.2")
"""Those of them in which there are two engines to select from."""

V1_ALONE = LLAMA4 - WITH_V0
"""Those of them whose V0 engine is gone."""


@functools.cache
def installed_release() -> str:
    """Return the upstream release of the installed vLLM.

    The local label is dropped and nothing else of the wheel is looked at: what a test expects
    must not depend on whether the wheel is patched.
    """
    release = metadata.version("vllm").partition("+")[0]
    if release not in RELEASES:
        raise LookupError(f"vllm {release} is installed, these tests cover {', '.join(RELEASES)}")
    return release


def backend_name(backend: str) -> str:
    """Return a V1 backend's name as this release has it: without V0 it needs no suffix."""
    return backend.removesuffix("_VLLM_V1") if installed_release() in V1_ALONE else backend

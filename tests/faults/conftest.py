"""The made-up upstream of the unit tests, and what all fault tests need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from made_upstream import Upstream, at, bare_upstream, templates, upstream

from .tool import Place, Truth, truth

__all__ = ["bare_upstream", "patched", "templates", "undisturbed", "upstream"]

#: The same inputs every time, or (FAULTS_EXAMPLES=10000) as many others as asked for.
EXAMPLES = int(os.environ.get("FAULTS_EXAMPLES", "300"))
settings.register_profile(
    "faults",
    max_examples=EXAMPLES,
    derandomize="FAULTS_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("faults")


@pytest.fixture(scope="session")
def patched(templates: dict[str, Path]) -> Upstream:
    """The upstream with one patch, for all tests that only read it."""
    return at(templates["patched"])


@pytest.fixture(scope="session")
def undisturbed(patched: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """What a run leaves that nothing disturbs."""
    return truth(Place.below(patched, tmp_path_factory.mktemp("undisturbed")))

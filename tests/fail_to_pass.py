"""What stock vLLM is expected to fail, as data that a run reports about itself.

The tests pass or fail by what the installed vLLM does. Which of them a *stock* wheel is expected
to fail is attached to them by the marker

    @pytest.mark.fail_to_pass(releases=[...], raises=r"regex of the error")

and written to the junit XML as properties, so that whoever ran them against a stock and against a
patched wheel of one release can judge the two files:

* `expect_on_stock` is "fail" or "pass", for the installed release;
* `fail_to_pass_releases` and `raises` are the marker's arguments.

A test with `expect_on_stock` = "fail" must have failed on stock with a message that `raises`
matches, and must pass on the patched wheel. Every other test must pass on both, or be skipped
with the same reason on both.
"""

from __future__ import annotations

import pytest

from regress.releases import CONTROLS, RELEASES, in_order, installed_release

MARKER = "fail_to_pass"


def add_marker(config: pytest.Config) -> None:
    """Register the marker; called by a suite's `pytest_configure`."""
    config.addinivalue_line(
        "markers",
        f"{MARKER}(releases, raises): stock vLLM fails the test in these releases with an error "
        "that the regex matches, patched vLLM passes it",
    )


def _expectation(item: pytest.Item) -> list[tuple[str, str]]:
    """Return the junit properties that say what stock vLLM is expected to do."""
    marker = item.get_closest_marker(MARKER)
    if marker is None:
        return [("expect_on_stock", "pass")]
    releases = frozenset(marker.kwargs["releases"])
    if unknown := releases - set(RELEASES):
        raise pytest.UsageError(f"{item.nodeid}: {sorted(unknown)} are no releases")
    if controls := releases & CONTROLS:
        raise pytest.UsageError(f"{item.nodeid}: {sorted(controls)} are controls")
    fails = installed_release() in releases
    return [
        ("expect_on_stock", "fail" if fails else "pass"),
        ("fail_to_pass_releases", " ".join(in_order(releases))),
        ("raises", marker.kwargs["raises"]),
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.user_properties.extend(_expectation(item))

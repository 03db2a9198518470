"""What becomes of a launch on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .attempt import Result


@dataclass(frozen=True)
class Outcome:
    """What the kernel comes to that decides over a launch."""

    kernel: str = ""
    """Its module and function; nothing if the launcher itself failed."""
    shared: int = 0
    """Bytes of shared memory that a block needs."""
    message: str = ""
    """Why it does not compile."""


def worst(results: Iterable[tuple[str, Result]]) -> Outcome:
    """Return what decides: the first kernel that does not compile, or the one with most memory."""
    outcomes = [Outcome(kernel, result.shared, result.message) for kernel, result in results]
    failed = [outcome for outcome in outcomes if outcome.message]
    return failed[0] if failed else max(outcomes, key=lambda outcome: outcome.shared)

"""What the programs that look at a release tell of their progress, and what they took."""

from __future__ import annotations

import resource
import sys


def say(text: str) -> None:
    """Tell the tool how far it is."""
    print(text, file=sys.stderr, flush=True)


def cpu_seconds() -> float:
    """Return what all processes have computed so far, which other work does not add to."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)

"""Several files of a site-packages folder written together: all of them or none."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from overlay.base.journal import IN_SITE, Journal


@contextmanager
def locked(site: Path) -> Iterator[Journal]:
    """Wait until no other process changes `site`, and keep others from it.

    The folder itself is locked, so that nothing is left behind.
    """
    handle = os.open(site, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield journal(site)
    finally:
        os.close(handle)


def journal(site: Path) -> Journal:
    """What is under way in `site`."""
    return Journal(site, site / IN_SITE, _forget_bytecode)


def _forget_bytecode(path: Path) -> None:
    """Remove what Python has compiled of a module: nothing else says that it is out of date if it
    was compiled to be used unchecked."""
    if path.suffix == ".py":
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            compiled.unlink(missing_ok=True)
        with suppress(OSError):
            (path.parent / "__pycache__").rmdir()

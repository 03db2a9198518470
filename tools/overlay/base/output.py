"""A file that a command's option names."""

from __future__ import annotations

from pathlib import Path

from overlay.base import atomic
from overlay.base.errors import Exit, OverlayError


def write(path: Path, data: bytes, option: str) -> None:
    """Write the file that `option` names, whole or not at all, and the folder it goes to.

    Raises:
        OverlayError: it can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.put(path, data)
    except OSError as error:
        raise OverlayError(
            f"cannot write {path}", error.strerror or str(error),
            f"Make its folder writable, or pass {option} with another file", Exit.ENVIRONMENT,
        ) from error  # fmt: skip

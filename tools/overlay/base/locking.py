"""Locks that runs of the tool hold against each other, a file each."""

from __future__ import annotations

import os
from pathlib import Path

from filelock import FileLock


def file_lock(path: Path, timeout: float = -1) -> FileLock:
    """The lock `path`, to be held with `with`; `timeout` is in seconds, and less than 0 for ever.

    Raises:
        OSError: the file can't be made. Left alone, FileLock would wait for ever for a folder
            that is gone, or that takes no files.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
    return FileLock(path, timeout=timeout)

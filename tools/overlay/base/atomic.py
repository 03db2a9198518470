"""Files that have their name once they are complete, and not before."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def part_of(target: Path) -> Path:
    """What a file is called while it is written.

    >>> part_of(Path("dist/a.whl"))
    PosixPath('dist/.a.whl.part')
    """
    return target.with_name(f".{target.name}.part")


@contextmanager
def writing(target: Path) -> Iterator[IO[bytes]]:
    """A stream to what becomes `target` at the end, on the disk and with mode 0644.

    If something is raised meanwhile, `target` stays as it is. Who is killed leaves
    `part_of(target)`, which the next one to write `target` takes over. Two at once write one
    after the other.

    Raises:
        OSError: it can't be written.
    """
    part = part_of(target)
    with os.fdopen(_take(part), "wb") as stream:
        try:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            os.fchmod(stream.fileno(), 0o644)
            part.replace(target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def put(target: Path, data: bytes) -> None:
    """Write a small file, whole or not at all.

    Raises:
        OSError: it can't be written.
    """
    with writing(target) as stream:
        stream.write(data)


def _take(part: Path) -> int:
    """An empty file of that name that nobody else writes to, locked until it is closed."""
    while True:
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_ours(handle, part):
                os.ftruncate(handle, 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_ours(handle: int, part: Path) -> bool:
    """Whether the open file still has that name, and no other that would change with it."""
    opened = os.fstat(handle)
    try:
        named = part.lstat()
    except FileNotFoundError:
        return False  # while we waited, it got its final name
    if not os.path.samestat(opened, named):
        return False
    if opened.st_nlink > 1:
        part.unlink()
        return False
    return True

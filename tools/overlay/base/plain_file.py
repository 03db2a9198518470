"""Files as they are read from a checkout or a command line, which may be anything."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

#: Bytes, several times those of the largest text that there is, a release's matrix.
LARGEST = 64 << 20


def read(path: Path) -> bytes:
    """The bytes of a plain file, or of one that a link leads to.

    Raises:
        OSError: there is none, it can't be read, or it is something that might never end: a
            device, a FIFO, gigabytes.
    """
    # Without O_NONBLOCK it would wait for somebody to write to a FIFO.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(_plain(path, handle), "rb") as stream:
        return stream.read()


def read_text(path: Path) -> str:
    """The text of a plain file, as Path.read_text gives it.

    Raises:
        OSError: as `read`.
        UnicodeDecodeError: it is not UTF-8.
    """
    return io.StringIO(read(path).decode(), newline=None).read()


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder of plain files.

    Raises:
        OSError: one is not plain, as `read` has it, or can't be written.
    """
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_dir():
            copy_tree(path, target / path.name)
        else:
            (target / path.name).write_bytes(read(path))


def _plain(path: Path, handle: int) -> int:
    """The open file, if it is plain and not too large; else it is closed."""
    found = os.fstat(handle)
    if stat.S_ISREG(found.st_mode) and found.st_size <= LARGEST:
        return handle
    os.close(handle)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if stat.S_ISREG(found.st_mode):
        raise OSError(errno.EFBIG, f"it has {found.st_size} bytes", str(path))
    raise OSError(errno.EINVAL, "it is no plain file", str(path))

"""Reading source archives without trusting them."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from overlay.base.errors import Exit, OverlayError
from overlay.base.paths import is_safe_path

#: An unpacked vLLM sdist is 27 to 45 MB; a member or a whole beyond these is no sdist.
MAX_MEMBER = 64 << 20
MAX_TOTAL = 512 << 20


@dataclass(frozen=True)
class Member:
    """A regular file of an archive."""

    name: str
    """Path below the archive's one top folder, posix."""
    mode: int
    """Permission bits."""


def unpack(path: Path, folder: Path) -> None:
    """Unpack a tarball that was checked or made here into `folder`."""
    with tarfile.open(path) as tar:
        # Python 3.10.12, 3.11.4 and 3.12 have the filter, and some of them warn without it.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(folder)


def read_sdist(path: Path) -> Iterator[tuple[Member, bytes]]:
    """The files of an sdist, in the archive's order.

    Raises:
        OverlayError: not a gzipped tar, truncated, or with a member that is no regular file,
            lies outside the one top folder, stands twice or is too large.
    """
    top = ""
    seen: set[str] = set()
    total = 0
    try:
        with (
            gzip.open(path) as unpacked,
            tarfile.open(fileobj=cast(IO[bytes], _Bounded(unpacked)), mode="r:") as tar,
        ):
            for info in tar:
                if info.isdir():
                    continue
                root, _, name = info.name.partition("/")
                top = top or root
                total += info.size
                in_top = root == top and is_safe_path(top)
                _refuse(path, info, name, in_top, name in seen, total)
                seen.add(name)
                stream = tar.extractfile(info)
                assert stream is not None
                yield Member(name, info.mode & 0o777), stream.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, LookupError) as error:
        raise OverlayError(
            f"{path.name} is damaged",
            f"it cannot be read as a gzipped tar ({error})",
            "Delete it from the cache and fetch it again",
            Exit.INTEGRITY,
        ) from error


class _Bounded:
    """An unpacked archive, as long as it is no larger than any source archive.

    Members are measured before they are read, but tarfile reads what lies between them (a
    header may claim gigabytes) without asking.
    """

    def __init__(self, stream: gzip.GzipFile) -> None:
        self._stream = stream
        self.tell = stream.tell

    def seek(self, offset: int, whence: int = 0) -> int:
        if offset > 2 * MAX_TOTAL:
            raise OSError("it is too large for a source archive")
        return self._stream.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_MEMBER:
            raise OSError("it has a part that is too large for a source archive")
        return self._stream.read(size)


def _refuse(
    path: Path, info: tarfile.TarInfo, name: str, in_top: bool, twice: bool, total: int
) -> None:
    """Raise for a member that no honest sdist has."""
    why = None
    if not info.isfile():
        why = "it is no regular file"
    elif not in_top or not is_safe_path(name):
        why = "it lies outside the archive's top folder"
    elif twice:
        why = "it stands twice"
    elif info.size > MAX_MEMBER or total > MAX_TOTAL:
        why = "it is too large for a source archive"
    if why:
        raise OverlayError(
            f"{path.name} is refused at member {info.name!r}",
            why,
            "Get the archive from a source you trust",
            Exit.INTEGRITY,
        )

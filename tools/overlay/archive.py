"""Reading source archives without trusting them."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from overlay.errors import Exit, OverlayError
from overlay.hunks import is_safe_path

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
        with tarfile.open(path, "r:gz") as tar:
            for info in tar:
                if info.isdir():
                    continue
                root, _, name = info.name.partition("/")
                top = top or root
                total += info.size
                _refuse(path, info, name, root == top, name in seen, total)
                seen.add(name)
                stream = tar.extractfile(info)
                assert stream is not None
                yield Member(name, info.mode & 0o777), stream.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise OverlayError(
            f"{path.name} is damaged",
            f"it cannot be read as a gzipped tar ({error})",
            "Delete it from the cache and fetch it again",
            Exit.INTEGRITY,
        ) from error


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

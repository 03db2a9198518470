"""RECORD of a wheel or of an installed distribution: its text, which lines are the wheel's own,
and whether they are the official ones.

Installers sort RECORD and add lines to it, so what is pinned is a digest of the lines that
came with the wheel, in order of their names.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from overlay.base.digest import sha256

Row = tuple[str, str, str]
"""Path, hash and size, as in RECORD."""

#: The name of the SBOM inside <dist-info>/sboms/.
SBOM = "vllm-overlay.cdx.json"
#: In dist-info: what was replaced by `vllm-overlay install`.
ORIGINALS = "vllm-overlay-originals.zip"
#: What installers put into dist-info.
_INSTALLERS = (
    ORIGINALS,
    "INSTALLER",
    "REQUESTED",
    "direct_url.json",
    "uv_build.json",
    "uv_cache.json",
)
#: Python files that a build writes: they name the version and the commit.
_GENERATED = ("vllm/_version.py",)
#: The compiled FlashAttention. Its Python files are its own project's; builds for CPUs have none.
_FLASH_ATTENTION = "vllm/vllm_flash_attn/"


class Pins(NamedTuple):
    """Digests of lines of RECORD, by which the official wheel's files are known."""

    every: str
    """Of all that came with the wheel."""
    python: str
    """Of Python files, but for those that a build writes."""
    source: str
    """Of these, but for FlashAttention's."""


def is_installers(name: str, info: str) -> bool:
    """Whether a line of RECORD is no file of the wheel; `info` is its dist-info folder.

    >>> names = ("../../../bin/vllm", "bin/vllm", "vllm/__pycache__/a.cpython-312.pyc", "vllm/a.py")
    >>> [is_installers(name, "vllm-1.0.dist-info") for name in names]
    [True, True, True, False]
    """
    inside = name.removeprefix(f"{info}/")
    if inside != name:
        return inside == "RECORD" or inside in _INSTALLERS
    return name.startswith(("../", "bin/")) or name.endswith(".pyc")


def moved(name: str, old: str, new: str) -> str:
    """What a file is called once its dist-info folder is `new` in place of `old`.

    >>> [moved(name, "a-1.dist-info", "a-2.dist-info") for name in ("a-1.dist-info/x", "a/x")]
    ['a-2.dist-info/x', 'a/x']
    """
    inside = name.removeprefix(f"{old}/")
    return name if inside == name else f"{new}/{inside}"


def pins(rows: Iterable[Row], info: str) -> Pins:
    """Digests of the wheel's own lines; `info` is its dist-info folder."""
    own = sorted(row for row in rows if not is_installers(row[0], info))
    python = [row for row in own if is_upstreams_python(row[0])]
    source = [row for row in python if not is_flash_attentions(row[0])]
    return Pins(_digest(own), _digest(python), _digest(source))


def is_upstreams_python(name: str) -> bool:
    """Whether a file is Python that every build has as upstream wrote it.

    >>> [is_upstreams_python(n) for n in ("vllm/a.py", "vllm/_version.py", "vllm/_C.abi3.so")]
    [True, False, False]
    """
    return name.endswith(".py") and name not in _GENERATED


def is_flash_attentions(name: str) -> bool:
    """Whether a file belongs to the compiled FlashAttention, which builds may have another of."""
    return name.startswith(_FLASH_ATTENTION)


def _digest(rows: Iterable[Row]) -> str:
    return hashlib.sha256("".join(f"{','.join(row)}\n" for row in rows).encode()).hexdigest()


def line(name: str, data: bytes) -> Row:
    """A file's line in RECORD."""
    return name, hash_field(hashlib.sha256(data).digest()), str(len(data))


def hash_field(digest: bytes) -> str:
    """A sha256 as RECORD writes it.

    >>> hash_field(bytes(32))
    'sha256=AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA'
    """
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def hash_of(path: Path) -> str | None:
    """A file's sha256 as RECORD writes it; None if it can't be read."""
    try:
        return hash_field(bytes.fromhex(sha256(path)))
    except OSError:
        return None


def read(text: str) -> dict[str, Row]:
    """RECORD's lines by file name.

    Raises:
        ValueError: a line is not a name, a hash and a size, or a name stands twice.
    """
    found: dict[str, Row] = {}
    try:
        for row in csv.reader(io.StringIO(text), strict=True):
            if not row:
                continue
            if len(row) != 3:
                raise ValueError(f"{','.join(row)!r} is not a name, a hash and a size")
            if row[0] in found:
                raise ValueError(f"it lists {row[0]} twice")
            found[row[0]] = row[0], row[1], row[2]
    except csv.Error as error:
        raise ValueError(str(error)) from error
    return found


def write(rows: Sequence[Row]) -> bytes:
    """RECORD with these lines."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().encode()


def dist_info(project: str, version: str) -> str:
    """Name of the dist-info folder."""
    return f"{project}-{version}.dist-info"

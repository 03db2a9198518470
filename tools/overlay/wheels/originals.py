"""What an install in place has replaced, kept in its dist-info folder: a zip file of the originals.

It has RECORD as it was, which tells of every other file what it is. Both are believed once they are
upstream's, by VERSIONS.toml.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version

from overlay.base.paths import is_safe_path
from overlay.releases.versions import Release, Versions
from overlay.wheels import record
from overlay.wheels.origin import Origin, match
from overlay.wheels.record import Row

#: What the patches touch is a megabyte; a larger zip is none of ours.
_MAX_SIZE = 64 << 20


class LostError(Exception):
    """It is not there, damaged, or not what was kept; the message says which."""


@dataclass(frozen=True)
class Originals:
    """What was replaced or removed."""

    origin: Origin
    """The build that was patched."""
    info: str
    """Name of its dist-info folder."""
    files: Mapping[str, bytes]
    """By path then."""
    rows: Mapping[str, Row]
    """RECORD then, by path."""

    def others(self) -> tuple[Row, ...]:
        """RECORD's lines of the wheel's own files that were left as they are, by path then."""
        own = (row for row in self.rows.values() if not record.is_installers(row[0], self.info))
        return tuple(row for row in own if row[0] not in self.files)


def write(files: Mapping[str, bytes]) -> bytes:
    """The zip file of these."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return out.getvalue()


def read(path: Path, versions: Versions, release: Release) -> Originals:
    """The originals of a build of `release`, from the zip file at `path`.

    Raises:
        LostError: it is not there, damaged, or not upstream's.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > _MAX_SIZE:
                raise LostError("it is too large")
            files = {info.filename: archive.read(info) for info in archive.infolist()}
        infos = [name.split("/")[0] for name in files if name.endswith(".dist-info/RECORD")]
        if len(infos) != 1:
            raise LostError("it holds no RECORD")
        (info,) = infos
        rows = record.read(files[f"{info}/RECORD"].decode())
        found = match(release, record.pins(rows.values(), info))
        version = info.removeprefix(f"{versions.upstream.project}-").removesuffix(".dist-info")
        if Version(version).public != release.name:
            raise LostError(f"it is of {version}")
    except FileNotFoundError as error:
        raise LostError("it is missing") from error
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, InvalidVersion) as error:
        raise LostError(str(error)) from error
    if found is None:
        raise LostError("its RECORD is not upstream's")
    build, how = found
    for name, data in files.items():
        if not is_safe_path(name):
            raise LostError(f"it holds {name!r}")
        expected = rows.get(name, ("", "", ""))[1]
        if not record.is_installers(name, info) and record.line(name, data)[1] != expected:
            raise LostError(f"{name} is not as its RECORD has it")
    return Originals(Origin.installed(build, version, how), info, files, rows)

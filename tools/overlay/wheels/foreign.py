"""A wheel of a release that somebody else built, and whether its Python files are upstream's.

Its Python files are hashed and compared with what VERSIONS.toml locks of the official wheel. For
what is compiled there is nothing to compare with: the patched wheel's SBOM has this one's sha256.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from overlay.base.digest import sha256
from overlay.base.errors import Exit, OverlayError, some
from overlay.patches.workspace import Workspace
from overlay.releases.versions import PinnedFile, Release
from overlay.wheels import rawzip, record
from overlay.wheels.identity import identify
from overlay.wheels.official import record_of
from overlay.wheels.origin import Match, Origin, match

_WHY_NOT = {
    "patched": "it is patched already",
    "control": "that release needs no patches, and there are none",
    "newer": "it is newer than the releases that there are patches for",
    "unknown": "there are no patches for its version",
}


def read(workspace: Workspace, path: Path) -> Origin:
    """The build that the wheel at `path` is; an official one if it is that, byte for byte.

    Raises:
        OverlayError: it is no wheel of a release with a series, it is damaged, or its Python files
            are not upstream's.
    """
    version, release = _named(workspace, path)
    try:
        pin = PinnedFile(file=path.name, sha256=sha256(path), size=path.stat().st_size)
        for build in release.builds:
            if pin.sha256 == build.wheel.sha256:
                return Origin.official(build)
        if path.name in [build.wheel.file for build in release.builds]:
            raise Origin(release, version, "source", pin).refused(
                "it has the official wheel's name, and another sha256"
            )
        with path.open("rb") as stream:
            build, found = _match(workspace, Origin(release, version, "source", pin), stream)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise _unusable(path, str(error), "Get it again", Exit.INTEGRITY) from error
    return Origin(build, version, found, pin)


def _named(workspace: Workspace, path: Path) -> tuple[str, Release]:
    """Version, as it is written, and release of a wheel, by its name."""
    try:
        name, _, _, _ = parse_wheel_filename(path.name)
    except InvalidWheelFilename as error:
        raise _unusable(path, str(error), "Name a wheel by its own name", Exit.USAGE) from error
    if not path.is_file():
        raise _unusable(path, f"there is no such file in {path.parent}", "Name one that there is",
                        Exit.USAGE)  # fmt: skip
    version = path.name.split("-")[1]
    project = workspace.versions.upstream.project
    identity = identify(version, workspace.versions)
    if name != canonicalize_name(project):
        raise _unusable(path, f"it is a wheel of {name}", f"Name one of {project}", Exit.USAGE)
    if identity.kind not in ("stock", "foreign") or identity.release is None:
        known = ", ".join(release.name for release in workspace.versions.patched)
        raise _unusable(path, _WHY_NOT[identity.kind], f"Name a wheel of {known}", Exit.USAGE)
    if not identity.release.is_patched:
        raise _unusable(path, _WHY_NOT["control"], "Use it as it is", Exit.USAGE)
    return version, identity.release


def _unusable(path: Path, why: str, fix: str, status: Exit) -> OverlayError:
    return OverlayError(f"{path.name} cannot be patched", why, fix, status)


def _match(workspace: Workspace, origin: Origin, stream: IO[bytes]) -> tuple[Release, Match]:
    """Which official wheel it is nearest to, and how much of it is that one's.

    Raises:
        OverlayError: its RECORD is not true, or its Python files are not upstream's.
    """
    members, info = rawzip.members(stream, origin.name), origin.info(workspace.versions)
    folders = {m.name.split("/")[0] for m in members if ".dist-info/" in m.name}
    if folders != {info}:
        raise origin.refused(f"its dist-info folder is {some(sorted(folders))}, not {info}")
    lines = record_of(origin, stream, members, info)
    python = {m.name: rawzip.read(stream, m) for m in members if m.name.endswith(".py")}
    for name, data in python.items():
        if record.line(name, data) != lines[name]:
            raise origin.refused(f"its RECORD is wrong about {name}")
    found = match(origin.release, record.pins(lines.values(), info))
    if found is None:
        names = list(_others(workspace, origin.release, python))
        raise origin.refused(f"not upstream's are {some(names) or 'its Python files'}")
    return found


def _others(workspace: Workspace, release: Release, python: Mapping[str, bytes]) -> Iterator[str]:
    """The Python files that are not the sdist's, or not there."""
    package = f"{workspace.versions.upstream.project}/"
    source = {
        path: data
        for path, _, data in workspace.store.files(workspace.base(release), (package,))
        if path.endswith(".py")
    }
    for name in sorted(source.keys() | python.keys()):
        if not record.is_upstreams_python(name) or record.is_flash_attentions(name):
            continue
        if name not in python:
            yield f"{name} (missing)"
        elif source.get(name) != python[name]:
            yield name

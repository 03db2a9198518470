"""Whose build of vLLM a version names: upstream's, this overlay's, or another."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from packageurl import PackageURL
from packaging.version import InvalidVersion, Version

from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release, Versions

#: What an installed vLLM is. Foreign: a build of a known release by someone else. Newer: than
#: all releases that are known here. Unknown: older, or between them.
Kind = Literal["absent", "stock", "patched", "foreign", "control", "newer", "unknown"]


@dataclass(frozen=True)
class Identity:
    """Which vLLM a version is of."""

    kind: Kind
    release: Release | None = None
    revision: int | None = None
    """Of the overlay."""
    label: str = ""
    """The local version that it has, or had before it was patched: cu118."""


@dataclass(frozen=True)
class StatedWheel:
    """A wheel as an SBOM tells of it."""

    version: str
    file: str
    sha256: str


def identify(version: str, versions: Versions) -> Identity:
    """Which release and revision a version is of."""
    try:
        parsed = Version(version)
    except InvalidVersion:
        return Identity("unknown")
    known = {release.version: release for release in versions.releases.values()}
    release = known.get(Version(parsed.public))
    if release is None:
        return Identity("newer" if parsed > max(known) else "unknown")
    if parsed.local is None:
        return Identity("stock" if release.is_patched else "control", release)
    own = versions.overlay.label
    ours = re.fullmatch(rf"(?:(.+)\.)?{own}\.(\d+)", parsed.local)
    if ours and release.is_patched and own not in (ours[1] or "").split("."):
        return Identity("patched", release, int(ours[2]), ours[1] or "")
    return Identity("foreign", release, label=parsed.local)


def version_of(info: str, versions: Versions) -> str:
    """The version in the name of a dist-info folder: METADATA may be gone."""
    return info.removeprefix(f"{versions.upstream.project}-").removesuffix(".dist-info")


def first_known(infos: Iterable[str], versions: Versions) -> Identity:
    """Of which release dist-info folders are: the patched one, else the first that is of one."""
    found = [identify(version_of(info, versions), versions) for info in infos]
    found.sort(key=lambda identity: (identity.kind != "patched", identity.release is None))
    return found[0] if found else Identity("unknown")


def official_build(bill: str | None, release: Release) -> Release | None:
    """The build of the release whose official wheel an SBOM of this overlay names; None: it names
    another build, or nothing."""
    stated = stated_wheel(bill)
    found = (one for one in release.builds if stated and stated.sha256 == one.wheel.sha256)
    return next(found, None)


def stated_wheel(bill: str | bytes | None) -> StatedWheel | None:
    """The wheel that an SBOM of this overlay says was patched; None if it names none."""
    try:
        (ancestor,) = json.loads(bill or "")["metadata"]["component"]["pedigree"]["ancestors"]
        file = PackageURL.from_string(ancestor["purl"]).qualifiers["file_name"]
        return StatedWheel(ancestor["version"], file, ancestor["hashes"][0]["content"])
    except (ValueError, LookupError, TypeError):
        return None


def other_patches(workspace: Workspace, bill: str | None, release: Release) -> str:
    """Why an install is not what this overlay builds, by its SBOM; empty if it is."""
    if bill is None:
        return "the installed one has no SBOM of an overlay"
    try:
        files = json.loads(bill)["components"]
        listed = {file["name"]: file["hashes"][0]["content"] for file in files}
    except (ValueError, LookupError, TypeError):
        return "the SBOM of the installed one is damaged"
    folder = workspace.project.patches
    here = {
        f"patches/{path}": hashlib.sha256(path.under(folder).read_bytes()).hexdigest()
        for path in workspace.series(release)
    }
    other = sorted(name for name, _ in listed.items() ^ here.items())
    return f"the installed one has another {', '.join(dict.fromkeys(other))}" if other else ""

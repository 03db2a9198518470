"""Whose build of vLLM a version names: upstream's, this overlay's, or another."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Literal

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
    ours = re.fullmatch(rf"{versions.overlay.label}\.(\d+)", parsed.local)
    if ours and release.is_patched:
        return Identity("patched", release, int(ours[1]))
    return Identity("foreign", release)


def is_of_official_wheel(bill: str | None) -> bool:
    """Whether an SBOM of this overlay names the official wheel, and not another build."""
    try:
        return bool(
            json.loads(bill or "")["metadata"]["component"]["pedigree"]["ancestors"][0]["hashes"]
        )
    except (ValueError, LookupError, TypeError):
        return False


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

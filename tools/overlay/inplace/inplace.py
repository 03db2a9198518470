"""Patching a vLLM that is already installed, and taking it back; no network, no official wheel.

What is installed is known by its RECORD, whose digest VERSIONS.toml locks, and every file by
RECORD. The patches are applied to the installed files; another digest in VERSIONS.toml tells
that they make of them what the locked tree has. So the files are the patched wheel's, to the byte.

The originals of what is replaced lie in dist-info, in a zip file that RECORD lists (`originals`).
So any overlay can restore them, whatever its patches are by then, and pip removes them with vLLM.
`repair` makes the patched files of them again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from overlay.answers import advice
from overlay.answers.probe import Python
from overlay.base.errors import Exit
from overlay.base.paths import is_safe_path
from overlay.inplace import installed, patching, session
from overlay.inplace.installed import Target
from overlay.inplace.patching import Patched
from overlay.inplace.session import Session, Writing
from overlay.patches.tally import Tally
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release, Versions
from overlay.wheels import originals, record, stated_version
from overlay.wheels.identity import Identity, identify, other_patches
from overlay.wheels.origin import Origin
from overlay.wheels.originals import LostError, Originals
from overlay.wheels.plan import rewritten
from overlay.wheels.record import Row

Action = Literal["patched", "reverted", "repaired", "nothing"]


@dataclass(frozen=True)
class InPlaceResult:
    """What was done, or would be."""

    action: Action
    site: Path
    before: str
    """Version."""
    after: str
    """Version."""
    patches: Tally
    """How many patches it has in the end, of those that its release's series lists."""
    files: Mapping[str, str]
    """Path of each file of the package that changes, with A, M or D; of a repair, every file."""
    checked: int = 0
    """Files compared with RECORD."""
    by_size: int = 0
    """Compiled libraries among them that were compared by size alone."""
    origin: Origin | None = None
    """The build that is patched; None if nothing was done."""
    recovered: bool = False
    """Whether an interrupted run was brought to its end first."""
    is_patched: bool = True
    """Whether it is patched now."""

    @property
    def is_official_build(self) -> bool:
        """Whether all that RECORD lists was the official wheel's, compiled files too."""
        return self.origin is None or self.origin.is_official


def install(
    workspace: Workspace,
    python: Python,
    *,
    other_build: bool = False,
    full: bool = False,
    dry_run: bool = False,
) -> InPlaceResult:
    """Patch the vLLM that `python` imports, all of it or nothing.

    `other_build` admits one whose compiled files are not the official wheel's; `full` hashes
    compiled libraries, which are compared by size else.

    Raises:
        OverlayError: there is none, it is not as upstream released it or not as RECORD says, or
            it can't be written.
    """
    with session.opened(workspace.versions, python, "install", dry_run=dry_run) as opened:
        target = installed.read(opened, workspace.versions)
        identity = identify(target.version, workspace.versions)
        if identity.kind == "patched":
            tally = _require_current(workspace, opened, target, identity, full)
            return nothing(opened, target.version, tally, is_patched=True)
        release = _require_stock(workspace.versions, opened, target, identity, other_build)
        origin = installed.require_build(target, release, python, other_build=other_build)
        fix = advice.anew(python, release, origin.label, other_build=other_build)
        target.require_unchanged(target.own, fix, full=full)
        patched = patching.patch(workspace, origin, target)
        _require_room(target, patched)
        if not dry_run:
            session.write(target.site, _patching(target, patched), "install")
        return InPlaceResult("patched", target.site, target.version, patched.plan.version,
                    patched.tally, patched.changes.kinds, len(target.own),
                    installed.by_size(target.own, full), origin, opened.has_recovered)  # fmt: skip


def revert(workspace: Workspace, python: Python, *, dry_run: bool = False) -> InPlaceResult:
    """Restore what `install` replaced in the vLLM that `python` imports.

    Raises:
        OverlayError: it was not patched in place, was changed since, or can't be written.
    """
    with session.opened(workspace.versions, python, "revert", dry_run=dry_run) as opened:
        target = installed.read(opened, workspace.versions)
        identity = identify(target.version, workspace.versions)
        release = identity.release
        if identity.kind == "stock" or (identity.kind == "foreign" and opened.has_recovered):
            return nothing(opened, target.version, none_of(workspace, release), is_patched=False)
        if release is None or identity.kind != "patched":
            why = "it is no vLLM of this overlay"
            raise target.refused(why, "There is nothing to revert", Exit.USAGE)
        kept = _kept(workspace.versions, opened, target, identity, release)
        writing, touched = _reverting(target, kept)
        target.require_unchanged(touched, advice.overlay(python, "--repair"))
        if not dry_run:
            session.write(target.site, writing, "revert")
        return InPlaceResult("reverted", target.site, target.version, kept.origin.version,
                    none_of(workspace, release), _kinds(target, writing), len(touched), 0,
                    kept.origin, opened.has_recovered, is_patched=False)  # fmt: skip


def none_of(workspace: Workspace, release: Release | None) -> Tally:
    """The tally of an unpatched vLLM."""
    return Tally(0, len(workspace.series(release)) if release else 0)


def nothing(opened: Session, version: str, tally: Tally, *, is_patched: bool) -> InPlaceResult:
    """The result where all is as it should be."""
    return InPlaceResult("nothing", opened.site, version, version, tally, {},
                         recovered=opened.has_recovered, is_patched=is_patched)  # fmt: skip


def _require_current(
    workspace: Workspace, opened: Session, target: Target, identity: Identity, full: bool
) -> Tally:
    """The patches of a patched vLLM; raise unless it is just what this overlay makes."""
    release = identity.release
    assert release is not None
    why = f"it is patched already, in revision {identity.revision} and not {release.revision}"
    if identity.revision == release.revision:
        bill = target.find(f"{target.info}/sboms/{record.SBOM}")
        why = other_patches(workspace, None if bill is None else bill.decode(), release)
    has_originals = f"{target.info}/{record.ORIGINALS}" in target.rows
    if why:
        first = advice.upstreams(opened.python, release, identity.label)
        if has_originals:
            first = advice.overlay(opened.python, "--revert")
        raise target.refused(why, f"Restore upstream's first: {first}", Exit.USAGE)
    fix = advice.wheel(release, identity.label)
    if has_originals:
        changed = set(target.changed(target.own, full=full))
        fix = advice.anew(opened.python, release, identity.label)
        if changed <= rewritten(workspace.patches(release), target.info):
            fix = advice.overlay(opened.python, "--repair")
    target.require_unchanged(target.own, fix, full=full)
    listed = len(workspace.series(release))
    return Tally(listed, listed)  # each of them is in the SBOM, with its hash


def _require_stock(
    versions: Versions, opened: Session, target: Target, identity: Identity, other_build: bool
) -> Release:
    """The release of an unpatched vLLM that this overlay has a series for.

    Raises:
        OverlayError: it is another vLLM, or another build and not to be admitted.
    """
    release = identity.release if identity.release and identity.release.is_patched else None
    if release and (identity.kind == "stock" or (identity.kind == "foreign" and other_build)):
        return release
    if release and identity.kind == "foreign":
        raise target.refused(
            "it is a build of someone else, by its version",
            f"If you trust that build: {advice.overlay(opened.python, '--other-build')}",
            Exit.USAGE,
        )
    known = ", ".join(release.name for release in versions.patched)
    reasons = {
        "newer": "it is newer than the releases that there are patches for",
        "unknown": "there are no patches for this version",
    }
    why = reasons.get(identity.kind, "this release needs no patches, and there are none")
    raise target.refused(why, f"Install one of {known}", Exit.USAGE)


def _require_room(target: Target, patched: Patched) -> None:
    for path, how in patched.changes.kinds.items():
        if how == "A" and os.path.lexists(target.site / path):
            why = f"{path}, which a patch adds, is there already"
            raise target.refused(why, "Move it away, if it is of use")


def _patching(target: Target, patched: Patched) -> Writing:
    """The patched files, and the rest of the dist-info folder under its new name."""
    return _moved(target, patched.plan.new_info, patched.written, patched.gone)


def _moved(
    target: Target, info: str, written: Mapping[str, bytes], removed: frozenset[str]
) -> Writing:
    """The same with the rest of the dist-info folder under its new name `info`."""
    folder = target.site / target.info
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    old = {f"{target.info}/{name}" for name in names}
    rest = {
        f"{info}/{name}": target.read(f"{target.info}/{name}")
        for name in names
        if f"{info}/{name}" not in written and f"{target.info}/{name}" not in removed
    }
    after = {**rest, **written}
    models = dict.fromkeys(after, f"{target.info}/RECORD")
    models |= {f"{info}/{name}": f"{target.info}/{name}" for name in names}
    return Writing(after, removed | old, models)


def _kept(
    versions: Versions, opened: Session, target: Target, identity: Identity, release: Release
) -> Originals:
    """What was replaced.

    Raises:
        OverlayError: it is not there, or damaged.
    """
    name = f"{target.info}/{record.ORIGINALS}"
    fix = f"Install upstream's: {advice.upstreams(opened.python, release, identity.label)}"
    if name not in target.rows:
        why = "it was installed as a patched wheel, so that nothing was replaced"
        raise target.refused(why, fix, Exit.USAGE)
    try:
        return originals.read(target.site / name, versions, release)
    except LostError as error:
        why = f"{record.ORIGINALS} is not what was kept of upstream's files ({error})"
        raise target.refused(why, fix) from error


def _reverting(target: Target, kept: Originals) -> tuple[Writing, list[Row]]:
    """How to restore the originals, and the lines of what is replaced or removed by that."""

    def then(name: str) -> str:
        return record.moved(name, target.info, kept.info)

    known = kept.rows.keys() | kept.files.keys()
    removed = frozenset(name for name in target.rows if then(name) not in known)
    for name in removed:
        if not is_safe_path(name):
            raise target.refused(f"its RECORD lists {name!r}", "Get it from a source you trust")
    touched = [r for r in target.own if r[0] in removed or then(r[0]) in kept.files]
    for name in kept.files.keys() - set(map(then, target.rows)):
        if os.path.lexists(target.site / name):
            raise target.refused(f"{name} is in the way", "Move it away, if it is of use")
    return _moved(target, kept.info, kept.files, removed), touched


def _kinds(target: Target, writing: Writing) -> dict[str, str]:
    """What happens to each of the package's files."""
    kinds = {name: "M" if name in target.rows else "A" for name in writing.written}
    kinds |= dict.fromkeys(writing.removed, "D")
    kinds.pop(stated_version.VERSION_MODULE, None)
    return {n: kind for n, kind in sorted(kinds.items()) if ".dist-info/" not in n}

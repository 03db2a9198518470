"""Patching a vLLM that is already installed, and taking it back; no network, no official wheel.

What is installed is known by its RECORD, whose digest VERSIONS.toml locks, and every file by
RECORD. The patches are applied to the installed files; another digest in VERSIONS.toml tells
that they make of them what the locked tree has. So the files are the patched wheel's, to the byte.

The originals of what is replaced lie in dist-info, in a zip file that RECORD lists. So any
overlay can restore them, whatever its patches are by then, and pip removes them with vLLM.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from overlay.answers import probe
from overlay.answers.probe import Python
from overlay.base.errors import Exit, OverlayError
from overlay.base.journal import IN_SITE, ChangedMeanwhileError
from overlay.base.paths import is_safe_path
from overlay.inplace import installed, site_files
from overlay.inplace.installed import Target
from overlay.patches.changes import Changes
from overlay.patches.patch import Patch
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release, Versions
from overlay.wheels import on_files, record, sbom, stated_version
from overlay.wheels.identity import Identity, identify, other_patches
from overlay.wheels.on_files import MisfitError
from overlay.wheels.plan import Plan, complete, require_repackable
from overlay.wheels.record import Row

#: What the patches touch is a megabyte; a larger zip is none of ours.
_MAX_ORIGINALS = 64 << 20

Action = Literal["patched", "reverted", "nothing"]


@dataclass(frozen=True)
class InPlaceResult:
    """What was done, or would be."""

    action: Action
    site: Path
    before: str
    """Version."""
    after: str
    """Version."""
    files: Mapping[str, str]
    """Path of each file of the package that the patches change, with A, M or D."""
    checked: int = 0
    """Files compared with RECORD."""
    by_size: int = 0
    """Compiled libraries among them that were compared by size alone."""
    is_official_build: bool = True
    """Whether all that RECORD lists was the official wheel's, compiled files too."""
    recovered: bool = False
    """Whether an interrupted run was brought to its end first."""


@dataclass(frozen=True)
class _Writing:
    """What to do to the files below site-packages."""

    written: Mapping[str, bytes]
    removed: frozenset[str]
    models: Mapping[str, str]
    """By path of a new file, an old one's: where mode and owner come from."""


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
    with _opened(workspace, python, dry_run) as (target, recovered):
        identity = identify(target.version, workspace.versions)
        if identity.kind == "patched":
            _require_current(workspace, target, identity, full)
            return _nothing(target, recovered)
        release = _require_stock(workspace.versions, target, identity)
        is_official = installed.require_official(target, release, other_build=other_build)
        target.require_unchanged(target.own, full=full)
        plan, changes = _plan(workspace, release, target, is_official)
        if not dry_run:
            _write(target, _patching(target, plan))
        return InPlaceResult("patched", target.site, target.version, plan.version, changes.kinds,
                    len(target.own), 0 if full else sum(map(installed.is_library, target.own)),
                    is_official, recovered)  # fmt: skip


def revert(workspace: Workspace, python: Python, *, dry_run: bool = False) -> InPlaceResult:
    """Restore what `install` replaced in the vLLM that `python` imports.

    Raises:
        OverlayError: it was not patched in place, was changed since, or can't be written.
    """
    with _opened(workspace, python, dry_run) as (target, recovered):
        identity = identify(target.version, workspace.versions)
        release = identity.release
        if identity.kind == "stock":
            return _nothing(target, recovered)
        if release is None or identity.kind != "patched":
            why = "it is no vLLM of this overlay"
            raise target.refused(why, "There is nothing to revert", Exit.USAGE)
        old = record.dist_info(workspace.versions.upstream.project, release.name)
        originals, rows = _originals(target, release, old)
        is_official = _require_originals(target, release, old, originals, rows)
        writing, touched = _reverting(target, old, originals, rows)
        target.require_unchanged(touched)
        if not dry_run:
            _write(target, writing)
        return InPlaceResult("reverted", target.site, target.version, release.name,
                    _kinds(target, writing), len(touched), 0, is_official, recovered)  # fmt: skip


def _nothing(target: Target, recovered: bool) -> InPlaceResult:
    return InPlaceResult(
        "nothing", target.site, target.version, target.version, {}, recovered=recovered
    )


@contextmanager
def _opened(workspace: Workspace, python: Python, dry_run: bool) -> Iterator[tuple[Target, bool]]:
    """The vLLM of `python`, kept from other runs; one that was interrupted is ended first."""
    project, recovered = workspace.versions.upstream.project, False
    site = installed.find_site(python, project)
    try:
        with site_files.locked(site) as journal:
            if journal.is_left():
                if dry_run:
                    raise _interrupted(
                        site,
                        "an earlier run was interrupted",
                        "Run it without --dry-run: it brings that to its end",
                    )
                recovered = bool(journal.finish())
            yield installed.read(site, project), recovered
    except ChangedMeanwhileError as error:
        raise _interrupted(
            site,
            f"an earlier run was interrupted, and {error.path} was changed since",
            f"Delete {site / IN_SITE} and install vLLM again: {installed.reinstall('RELEASE')}",
        ) from error
    except OSError as error:
        raise _unwritable(site, error.strerror or str(error)) from error


def _interrupted(site: Path, why: str, fix: str) -> OverlayError:
    return OverlayError(f"cannot go on in {site}", why, fix, Exit.INTEGRITY)


def _unwritable(path: Path, why: str) -> OverlayError:
    return OverlayError(
        f"cannot write {path}",
        f"{why}; nothing was changed",
        "Run it as the user who installed vLLM, on a file system that can be written; for an "
        "image, in its Dockerfile",
        Exit.ENVIRONMENT,
    )


def _require_current(workspace: Workspace, target: Target, identity: Identity, full: bool) -> None:
    """Raise unless a patched vLLM is just what this overlay makes."""
    release = identity.release
    assert release is not None
    why = f"it is patched already, in revision {identity.revision} and not {release.revision}"
    if identity.revision == release.revision:
        bill = target.find(f"{target.info}/sboms/{record.SBOM}")
        why = other_patches(workspace, None if bill is None else bill.decode(), release)
    if why:
        first = installed.reinstall(release.name)
        if f"{target.info}/{record.ORIGINALS}" in target.rows:
            first = "vllm-overlay install --revert"
        raise target.refused(why, f"Restore upstream's first: {first}", Exit.USAGE)
    target.require_unchanged(target.own, full=full)


def _require_stock(versions: Versions, target: Target, identity: Identity) -> Release:
    """The release of an unpatched vLLM that this overlay has a series for.

    Raises:
        OverlayError: it is another vLLM.
    """
    if identity.release and identity.kind == "stock":
        return identity.release
    known = ", ".join(release.name for release in versions.patched)
    reasons = {
        "control": "this release needs no patches, and there are none",
        "foreign": "it is a build of someone else, by its version",
        "newer": "it is newer than the releases that there are patches for",
        "unknown": "there are no patches for this version",
    }
    fix = f"Install one of {known}"
    raise target.refused(reasons[identity.kind], fix, Exit.USAGE)


def _plan(
    workspace: Workspace, release: Release, target: Target, is_official: bool
) -> tuple[Plan, Changes]:
    patches = workspace.patches(release)
    changes = _apply(release, target, patches)
    bill = sbom.build(workspace.versions, release, patches, is_official_build=is_official)
    plan = complete(
        workspace.versions, release, changes, bill, lambda name: target.read(name).decode()
    )
    return plan, changes


def _apply(release: Release, target: Target, patches: Sequence[Patch]) -> Changes:
    """What the patches make of the installed files.

    Raises:
        OverlayError: a patch does not apply, or the outcome is not the one locked.
    """
    try:
        changes = on_files.apply(patches, target.find)
    except MisfitError as error:
        raise OverlayError(
            f"{release.name}: {error.path} does not apply to what is installed",
            error.why,
            f"See what it must fit with 'vllm-overlay validate {release.name}'",
            Exit.PATCH,
        ) from error
    _require_possible(release, target, changes)
    return changes


def _require_possible(release: Release, target: Target, changes: Changes) -> None:
    for path, how in changes.kinds.items():
        require_repackable(release, path, how, path in target.rows)
        if how == "A" and os.path.lexists(target.site / path):
            why = f"{path}, which a patch adds, is there already"
            raise target.refused(why, "Move it away, if it is of use")
    if changes.digest != release.files:
        raise OverlayError(
            f"{release.name}: what the patches make of it is not what is locked",
            f"its digest is {changes.digest}, VERSIONS.toml says {release.files}",
            f"Undo the change of the patches, or run 'vllm-overlay lock {release.name}'",
            Exit.INTEGRITY,
        )


def _patching(target: Target, plan: Plan) -> _Writing:
    """The plan as files of the install, with the originals and a new RECORD."""
    # The file that it was installed from is not what it is any more.
    origins = {f"{plan.old_info}/{n}" for n in (probe.ORIGIN, installed.CACHED_ORIGIN)}
    gone = plan.removed | (origins & target.rows.keys())
    kept = sorted({*plan.replaced, *gone, f"{plan.old_info}/RECORD"})
    written = {plan.target(n): d for n, d in {**plan.replaced, **plan.added}.items()}
    written[f"{plan.new_info}/{record.ORIGINALS}"] = _zip({n: target.read(n) for n in kept})
    rows = [
        (plan.target(name), *row[1:])
        for name, row in target.rows.items()
        if name not in gone and not _is_bytecode_of(name, {*plan.replaced, *gone})
    ]
    renewed = {name: record.line(name, data) for name, data in written.items()}
    names = {row[0] for row in rows}
    rows = [renewed.get(row[0], row) for row in rows]
    rows += [row for name, row in renewed.items() if name not in names]
    record_name = f"{plan.new_info}/RECORD"
    rows = [row for row in rows if row[0] != record_name] + [(record_name, "", "")]
    written[record_name] = record.write(rows)
    return _moved(target, plan.new_info, written, gone)


def _moved(
    target: Target, info: str, written: Mapping[str, bytes], removed: frozenset[str]
) -> _Writing:
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
    return _Writing(after, removed | old, models)


def _is_bytecode_of(name: str, modules: set[str]) -> bool:
    """Whether `name` is what Python has compiled of one of `modules`; it goes with them."""
    path = PurePosixPath(name)
    source = f"{path.parent.parent}/{path.name.partition('.')[0]}.py"
    return path.suffix == ".pyc" and source in modules


def _zip(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return out.getvalue()


def _originals(
    target: Target, release: Release, old: str
) -> tuple[dict[str, bytes], Mapping[str, Row]]:
    """What was replaced, by its path then, and the lines of the RECORD among it.

    Raises:
        OverlayError: it is not there, or damaged.
    """
    name = f"{target.info}/{record.ORIGINALS}"
    if name not in target.rows:
        raise target.refused(
            "it was installed as a patched wheel, so that nothing was replaced",
            f"Install upstream's: {installed.reinstall(release.name)}",
            Exit.USAGE,
        )
    try:
        with zipfile.ZipFile(target.site / name) as archive:
            if sum(info.file_size for info in archive.infolist()) > _MAX_ORIGINALS:
                raise zipfile.BadZipFile("it is too large")
            found = {info.filename: archive.read(info) for info in archive.infolist()}
        rows = record.read(found[f"{old}/RECORD"].decode())
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise _bad_originals(target, release, str(error)) from error
    return found, rows


def _bad_originals(target: Target, release: Release, why: str) -> OverlayError:
    return target.refused(
        f"{record.ORIGINALS} is not what was kept of upstream's files ({why})",
        f"Install upstream's: {installed.reinstall(release.name)}",
    )


def _require_originals(
    target: Target,
    release: Release,
    old: str,
    originals: Mapping[str, bytes],
    rows: Mapping[str, Row],
) -> bool:
    """Raise unless the originals are upstream's. Returns whether of the official wheel."""
    pins = record.pins(rows.values(), old)
    if pins[1] != release.record_python:
        raise _bad_originals(target, release, "its RECORD is not upstream's")
    for name, data in originals.items():
        if record.is_installers(name, old):
            continue
        if record.line(name, data)[1] != rows.get(name, ("", "", ""))[1]:
            raise _bad_originals(target, release, f"{name} is not as its RECORD has it")
    return pins[0] == release.record


def _reverting(
    target: Target, old: str, originals: Mapping[str, bytes], rows: Mapping[str, Row]
) -> tuple[_Writing, list[Row]]:
    """How to restore the originals, and the lines of what is replaced or removed by that."""

    def then(name: str) -> str:
        return record.moved(name, target.info, old)

    known = rows.keys() | originals.keys()
    removed = frozenset(name for name in target.rows if then(name) not in known)
    for name in removed | originals.keys():
        if not is_safe_path(name):
            raise target.refused(f"its RECORD lists {name!r}", "Get it from a source you trust")
    touched = [r for r in target.own if r[0] in removed or then(r[0]) in originals]
    for name in originals.keys() - set(map(then, target.rows)):
        if os.path.lexists(target.site / name):
            raise target.refused(f"{name} is in the way", "Move it away, if it is of use")
    return _moved(target, old, originals, removed), touched


def _kinds(target: Target, writing: _Writing) -> dict[str, str]:
    """What happens to each of the package's files."""
    kinds = {name: "M" if name in target.rows else "A" for name in writing.written}
    kinds |= dict.fromkeys(writing.removed, "D")
    kinds.pop(stated_version.VERSION_MODULE, None)
    return {n: kind for n, kind in sorted(kinds.items()) if ".dist-info/" not in n}


def _write(target: Target, writing: _Writing) -> None:
    """Do it, or nothing.

    Raises:
        OverlayError: a folder can't be written.
        OSError: something else is amiss, a full disk say; nothing has changed.
    """
    names = {*writing.written, *writing.removed}
    for folder in sorted({target.site, *((target.site / name).parent for name in names)}):
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            raise _unwritable(folder, "this user may not, or it is read-only")
    # What is new comes first: there is never less than one whole dist-info's METADATA.
    files: dict[str, bytes | None] = {
        name: writing.written[name] for name in sorted(writing.written)
    }
    files |= dict.fromkeys(sorted(writing.removed), None)
    site_files.journal(target.site).write(files, models=writing.models)

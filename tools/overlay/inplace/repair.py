"""Making a vLLM that was patched in place whole again, without a network.

What it was before is known from the originals that it keeps, and from RECORD among them, which
tells of every other file what it is. The patches are applied to that once more; what is not so on
the disk is written. So the SBOM, METADATA and RECORD that lie there are not needed or believed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from overlay.answers import advice, probe
from overlay.answers.probe import Python
from overlay.base.errors import Exit, OverlayError, some
from overlay.inplace import inplace, installed, patching, session
from overlay.inplace.inplace import InPlaceResult
from overlay.inplace.installed import Target
from overlay.inplace.patching import Patched
from overlay.inplace.session import Session, Writing
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Versions
from overlay.wheels import originals, record
from overlay.wheels.identity import Identity, identify, version_of
from overlay.wheels.originals import LostError, Originals
from overlay.wheels.record import Row


@dataclass(frozen=True)
class _Before(Target):
    """A patched vLLM as it was: the originals, and the files that were left as they are."""

    now: str
    """Name of its dist-info folder, patched."""
    originals: Mapping[str, bytes]
    """By path then."""

    def path(self, name: str) -> Path:
        return self.site / record.moved(name, self.info, self.now)

    def read(self, name: str) -> bytes:
        kept = self.originals.get(name)
        return super().read(name) if kept is None else kept


def repair(
    workspace: Workspace, python: Python, *, full: bool = False, dry_run: bool = False
) -> InPlaceResult:
    """Make the files whole again that the patches change in the vLLM that `python` imports.

    `full` hashes compiled libraries, which are compared by size else.

    Raises:
        OverlayError: it was not patched in place, what it kept is lost, another file of it was
            changed, or it can't be written.
    """
    versions = workspace.versions
    with session.opened(versions, python, "repair", dry_run=dry_run) as opened:
        infos = probe.dist_infos(opened.site, versions.upstream.project)
        found = {info: identify(version_of(info, versions), versions) for info in infos}
        info = _patched_one(opened, versions, found)
        if info is None:
            version = version_of(infos[0], versions)
            none = inplace.none_of(workspace, found[infos[0]].release)
            return inplace.nothing(opened, version, none, is_patched=False)
        now = Target(opened.site, info, version_of(info, versions))
        kept = _kept(workspace, opened, now, found[info])
        if not {*infos} <= {info, kept.info}:
            raise _not_one(opened, versions, infos)
        before = _Before(opened.site, kept.info, kept.origin.version, info, kept.files)
        _require_unchanged(versions, opened, before, kept, now, full=full)
        patched = patching.patch(workspace, kept.origin, before)
        writing = _writing(now, before, patched)
        kinds = _kinds(now.site, writing)
        if not kinds:
            return inplace.nothing(opened, now.version, patched.tally, is_patched=True)
        if not dry_run:
            session.write(now.site, writing, "repair")
        others = kept.others()
        return InPlaceResult("repaired", now.site, now.version, patched.plan.version,
                    patched.tally, kinds, len(others), installed.by_size(others, full), kept.origin,
                    opened.has_recovered)  # fmt: skip


def _patched_one(opened: Session, versions: Versions, found: Mapping[str, Identity]) -> str | None:
    """The dist-info folder of the patched vLLM; None if a run was ended that leaves upstream's.

    Raises:
        OverlayError: there is none, or several.
    """
    patched = [info for info, identity in found.items() if identity.kind == "patched"]
    if len(patched) == 1:
        return patched[0]
    if patched or len(found) != 1:
        raise _not_one(opened, versions, list(found))
    if opened.has_recovered:
        return None
    ((info, identity),) = found.items()
    raise OverlayError(
        f"there is nothing to repair in {opened.site}",
        f"{info} is not of a patched vLLM",
        f"Patch it: {advice.patch(opened.python, identity.label)}",
        Exit.USAGE,
    )


def _not_one(opened: Session, versions: Versions, infos: Sequence[str]) -> OverlayError:
    return installed.not_one(opened, infos, installed.without_metadata(opened, versions, infos))


def _kept(workspace: Workspace, opened: Session, now: Target, identity: Identity) -> Originals:
    """What was replaced in the patched vLLM `now`.

    Raises:
        OverlayError: it is lost, or was not replaced by patches of this revision.
    """
    release = identity.release
    assert release is not None
    anew = f"Install it anew: {_anew(workspace.versions, opened, now, identity.label)}"
    if identity.revision != release.revision:
        why = f"it is of revision {identity.revision}, and the patches here are {release.revision}"
        raise now.refused(why, f"Use the overlay of that revision. {anew}", Exit.USAGE)
    path = now.site / now.info / record.ORIGINALS
    try:
        return originals.read(path, workspace.versions, release)
    except LostError as error:
        rows = _rows(now)
        if not path.exists() and rows and f"{now.info}/{record.ORIGINALS}" not in rows:
            raise now.refused(
                "it was installed as a patched wheel, so that nothing was kept",
                f"Install it again: {advice.wheel(release, identity.label)}",
                Exit.USAGE,
            ) from error
        why = f"{record.ORIGINALS} is not what was kept of upstream's files ({error})"
        raise now.refused(why, anew) from error


def _rows(now: Target) -> Mapping[str, Row] | None:
    """RECORD as it is; None if it can't be read."""
    try:
        return now.rows
    except (OSError, ValueError):
        return None


def _anew(
    versions: Versions, opened: Session, now: Target, label: str, *, other_build: bool = False
) -> str:
    """How to install it again, and the patches on it; pip can't uninstall what has no RECORD."""
    infos = probe.dist_infos(now.site, versions.upstream.project)
    release = identify(now.version, versions).release
    if _rows(now) is None or len(infos) > 1:
        again = advice.without_metadata(opened.python, now.site, infos, release, label)
    else:
        again = advice.upstreams(opened.python, release, label)
    return f"{again}, then {advice.patch(opened.python, label, other_build)}"


def _require_unchanged(
    versions: Versions,
    opened: Session,
    before: Target,
    kept: Originals,
    now: Target,
    *,
    full: bool,
) -> None:
    """Raise unless what the patches leave alone is as it was."""
    if names := before.changed(kept.others(), full=full):
        is_other = not kept.origin.is_official
        anew = _anew(versions, opened, now, kept.origin.label, other_build=is_other)
        raise now.refused(
            f"not upstream's are {some(names)}, which patches do not change",
            f"Keep what you need of that, and install it anew: {anew}",
        )


def _writing(now: Target, before: _Before, patched: Patched) -> Writing:
    """What is not on the disk as it should be."""
    written = {
        name: data for name, data in patched.written.items() if _bytes(now.path(name)) != data
    }
    gone = {record.moved(name, before.info, now.info) for name in patched.gone}
    leftover = now.site / before.info
    gone |= {str(path.relative_to(now.site)) for path in leftover.rglob("*") if path.is_file()}
    removed = frozenset(name for name in gone if now.path(name).exists())
    return Writing(written, removed, dict.fromkeys(written, f"{now.info}/WHEEL"))


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _kinds(site: Path, writing: Writing) -> dict[str, str]:
    """What happens to each file."""
    kinds = {name: "M" if (site / name).exists() else "A" for name in writing.written}
    return dict(sorted({**kinds, **dict.fromkeys(writing.removed, "D")}.items()))

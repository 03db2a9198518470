"""Patched wheels: the official wheel, or another build's, repacked without a compiler or a GPU.

Unchanged members are copied as compressed bytes. The files the series changes are
rewritten, the version changes together in the file name, the dist-info folder, METADATA
and vllm/_version.py, an SBOM is added, and RECORD is regenerated.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from overlay.base import atomic
from overlay.base.console import log_for
from overlay.base.digest import sha256
from overlay.base.errors import Exit, OverlayError
from overlay.patches.tree import Result
from overlay.patches.workspace import Workspace
from overlay.releases.sources import damaged
from overlay.releases.versions import Release
from overlay.wheels import foreign, rawzip, record, sbom
from overlay.wheels.official import record_of, require_locked
from overlay.wheels.origin import Origin
from overlay.wheels.plan import NotRepackableError, Plan, file_name, plan_wheel
from overlay.wheels.rawzip import Member
from overlay.wheels.record import Row


@dataclass(frozen=True)
class Built:
    """A wheel or sdist that was built."""

    path: Path
    sha256: str
    size: int
    """Bytes."""

    @classmethod
    def of(cls, path: Path) -> Built:
        """The file at `path`, hashed."""
        return cls(path, sha256(path), path.stat().st_size)


def build_wheel(workspace: Workspace, release: Release, folder: Path) -> Built:
    """Write the patched wheel of `release` into `folder`, atomically.

    Raises:
        OverlayError: the series does not apply or is not as locked, it changes what repacking
            can't (see `plan_wheel`), the official wheel is damaged, or `folder` can't be written.
    """
    result = require_locked_tree(workspace, release)
    source = workspace.fetcher.fetch(release, "wheel")
    return _repacked(workspace, Origin.official(release), result, source, folder)


def build_from(workspace: Workspace, source: Path, folder: Path) -> Built:
    """The same, of another build's wheel `source`, whose tags and local version the patched one
    keeps.

    Raises:
        OverlayError: as `build_wheel`, or the Python files of `source` are not upstream's.
    """
    origin = foreign.read(workspace, source)
    result = require_locked_tree(workspace, origin.release)
    return _repacked(workspace, origin, result, source, folder)


def _repacked(
    workspace: Workspace, origin: Origin, result: Result, source: Path, folder: Path
) -> Built:
    log = log_for(origin.release.name)
    patches = [a.patch for a in result.applied if a.patch]
    bill = sbom.build(workspace.versions, origin, patches)
    try:
        with source.open("rb", buffering=0) as stream:
            members = rawzip.members(stream, source.name)
            what = plan_wheel(workspace, origin, result, stream, members, bill)
            log.info("repacking %s, patches: %d", source.name, len(patches))
            target = folder / file_name(workspace.versions, origin)
            built = _write_atomically(origin, source, stream, members, what, target)
    except zipfile.BadZipFile as error:
        _require_as_pinned(origin, source, sha256(source), error)
        raise origin.refused(str(error)) from error
    return Built(target, *built)


def _require_as_pinned(
    origin: Origin, source: Path, found: str, cause: Exception | None = None
) -> None:
    """Raise unless `found` is the sha256 that the file `source` is to have."""
    assert origin.wheel is not None
    if found == origin.wheel.sha256:
        return
    if origin.is_official:
        raise damaged(origin.release.name, source) from cause
    raise origin.refused("it was changed while it was read") from cause


def sum_of(workspace: Workspace, release: Release) -> tuple[str, int] | None:
    """The sha256 and size of the patched wheel, which is built and not kept; None if the series
    changes what repacking can't.

    Raises:
        OverlayError: as `build_wheel` otherwise.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="vllm-overlay-") as folder:
            built = build_wheel(workspace, release, Path(folder))
    except NotRepackableError:
        return None
    return built.sha256, built.size


def wheel_of(workspace: Workspace, release: Release, is_stock: bool, folder: Path) -> Path:
    """The official wheel, checked, or the patched one, built into `folder`.

    Raises:
        OverlayError: as `Fetcher.fetch`, or as `build_wheel`.
    """
    if is_stock:
        return workspace.fetcher.fetch(release, "wheel", check=True)
    return build_wheel(workspace, release, folder).path


def require_locked_tree(workspace: Workspace, release: Release) -> Result:
    """The release with its series applied, if that is the tree locked in VERSIONS.toml.

    Raises:
        OverlayError: a patch does not apply, or the tree is another one.
    """
    result = workspace.apply(release).require()
    if result.tree != release.tree:
        raise OverlayError(
            f"{release.name}: the patched tree is not the one locked",
            f"it is {result.tree}, VERSIONS.toml says {release.tree}",
            f"Undo the change of the patches, or run 'vllm-overlay lock {release.name}'",
            Exit.INTEGRITY,
        )
    return result


def _write_atomically(
    origin: Origin,
    source: Path,
    stream: IO[bytes],
    members: Sequence[Member],
    what: Plan,
    target: Path,
) -> tuple[str, int]:
    """Write the wheel, whole or not at all. Returns its sha256 and size."""
    release = origin.release
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic.writing(target) as out, _Sha256OfFile(source) as check:
            digest = hashlib.sha256()

            def write(data: bytes) -> None:
                out.write(data)
                digest.update(data)

            repack(origin, stream, members, what, write)
            _require_as_pinned(origin, source, check.hexdigest())
            if origin.is_official and release.patched_sha256 not in (None, digest.hexdigest()):
                raise _other_sum(release, digest.hexdigest())
            size = out.tell()
    except (OSError, OverflowError) as error:
        raise unwritable(release, target, error) from error
    return digest.hexdigest(), size


def _other_sum(release: Release, found: str) -> OverlayError:
    return OverlayError(
        f"{release.name}: the patched wheel is not the one locked",
        f"its sha256 is {found}, VERSIONS.toml says {release.patched_sha256}",
        f"Undo the change of the patches, or run 'vllm-overlay lock {release.name}'",
        Exit.INTEGRITY,
    )


def unwritable(release: Release, target: Path, error: Exception) -> OverlayError:
    """The error for a build that cannot be written."""
    return OverlayError(
        f"{release.name}: cannot write {target}",
        getattr(error, "strerror", None) or str(error),
        f"Name a folder with --out that can be written and has {release.wheel.size >> 20} MiB free",
        Exit.ENVIRONMENT,
    )


class _Sha256OfFile:
    """The sha256 of a file, taken in a thread while its members are copied (hashing releases
    the GIL, so on two cores it costs no time)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        with self._path.open("rb", buffering=0) as stream:
            while not self._stop and (data := stream.read(rawzip.CHUNK)):
                self._digest.update(data)

    def __enter__(self) -> _Sha256OfFile:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()

    def hexdigest(self) -> str:
        self._thread.join()
        return self._digest.hexdigest()


def repack(
    origin: Origin,
    stream: IO[bytes],
    members: Sequence[Member],
    what: Plan,
    write: rawzip.Write,
) -> None:
    """Write the repacked wheel through `write`. The invariants:

    - members stand in the order of `origin`; new ones of the package, sorted, before
      the dist-info folder, new ones of dist-info at its end, RECORD last;
    - an unchanged member keeps its compressed bytes and its line in RECORD;
    - a changed or new one is stored uncompressed, with a fresh line in RECORD;
    - times, modes and flags are `rawzip.Writer`'s, so the bytes depend on `origin` and the plan
      alone.
    """
    old, record_name = what.old_info, f"{what.new_info}/RECORD"
    lines = record_of(origin, stream, members, old)
    if origin.is_official:
        require_locked(origin.release, lines.values(), old)
    rows: list[Row] = []
    writer = rawzip.Writer(write)

    def store(name: str, data: bytes) -> None:
        target = what.target(name)
        writer.store(target, data)
        rows.append(record.line(target, data))

    def copy(member: Member) -> None:
        target = what.target(member.name)
        writer.copy(stream, member, target)
        rows.append((target, *lines[member.name][1:]))

    kept = [m for m in members if m.name not in what.removed and m.name != f"{old}/RECORD"]
    for in_dist_info in (False, True):
        for member in kept:
            if member.name.startswith(f"{old}/") is not in_dist_info:
                continue
            if member.name in what.replaced:
                store(member.name, what.replaced[member.name])
            else:
                copy(member)
        for name in sorted(what.added):
            if name.startswith(f"{old}/") is in_dist_info:
                store(name, what.added[name])
    rows.append((record_name, "", ""))
    writer.store(record_name, record.write(rows))
    writer.close()

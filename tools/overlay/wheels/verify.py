"""Is this wheel what it says it is? Proved against this repository.

The checks, in the order they are printed:

- RECORD: every file listed, hashed and sized right, by the `installer` library;
- version: the same in the file name, the dist-info folder, METADATA and vllm/_version.py;
- patched files: what the locked patches make of upstream's;
- other files: upstream's;
- SBOM: valid CycloneDX, and what it says is what was checked.

Without the official wheel, patched files are compared with the digest `files` of VERSIONS.toml;
then the patches are taken back (`on_files`, `unpatch`), and all files with the digests of
upstream's RECORD. With it, patched files are compared with the patched source tree, and the others
with it, as compressed bytes: that names what differs.
"""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from typing import IO

from installer.sources import WheelFile
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version

from overlay.base.console import counted
from overlay.base.errors import Exit, OverlayError
from overlay.patches.changes import Changes
from overlay.patches.patch import Patch
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release
from overlay.wheels import on_files, rawzip, record, sbom, stated_version, unpatch
from overlay.wheels.on_files import MisfitError
from overlay.wheels.plan import Plan, plan_wheel
from overlay.wheels.rawzip import Member
from overlay.wheels.unpatch import NotPatchedError


@dataclass(frozen=True)
class Check:
    """One check and what it found wrong."""

    name: str
    detail: str
    """What was compared, in a few words."""
    problems: tuple[str, ...]


@dataclass(frozen=True)
class _Opened:
    path: Path
    stream: IO[bytes]
    by_name: dict[str, Member]

    def read(self, name: str) -> bytes | None:
        member = self.by_name.get(name)
        return None if member is None else rawzip.read(self.stream, member)


def release_of(workspace: Workspace, path: Path) -> Release:
    """The release that a patched wheel's file name speaks of.

    Raises:
        OverlayError: no such file, or not a name that this overlay gives.
    """
    if not path.is_file():
        raise OverlayError(
            f"no wheel at {path}", "there is no such file", "Build one with 'vllm-overlay build'",
            Exit.USAGE,
        )  # fmt: skip
    try:
        name, version, _, _ = parse_wheel_filename(path.name)
    except InvalidWheelFilename as error:
        raise _foreign(path, str(error)) from error
    for release in workspace.versions.patched:
        if name == workspace.versions.upstream.project and version == Version(
            workspace.versions.local_version(release)
        ):
            return release
    raise _foreign(path, f"no release of VERSIONS.toml builds {name} {version}")


def _foreign(path: Path, why: str) -> OverlayError:
    return OverlayError(
        f"{path.name} is none of this overlay's wheels",
        why,
        "Name a wheel that 'vllm-overlay build' of this checkout wrote",
        Exit.USAGE,
    )


def verify(workspace: Workspace, path: Path, *, official: bool = False) -> list[Check]:
    """Run every check on the wheel at `path`.

    It is compared with the official wheel if that is in the cache, and with `official` in any
    case; else nothing is needed but this repository.

    Raises:
        OverlayError: it is none of ours, cannot be read as a zip file at all, or what it is
            compared with is unavailable.
    """
    release = release_of(workspace, path)
    patches = workspace.patches(release)
    bill = sbom.build(workspace.versions, release, patches)
    version = workspace.versions.local_version(release)
    info = record.dist_info(workspace.versions.upstream.project, version)
    with path.open("rb") as stream:
        ours = _open(path, stream)
        try:
            if official or workspace.fetcher.cache.has(release.wheel):
                files = _against_wheel(workspace, release, ours, bill)
            else:
                files = _against_locks(workspace, release, ours, patches, info)
            return [
                _run("RECORD", _record(path), counted(len(ours.by_name), "file")),
                _run("version", _version(ours, info, version), version),
                *files,
                _run("SBOM", _sbom(ours, info, bill), counted(len(patches), "patch")),
            ]
        except zipfile.BadZipFile as error:
            raise OverlayError(
                f"{path.name} is damaged", str(error), "Build it again", Exit.INTEGRITY
            ) from error


def _against_wheel(
    workspace: Workspace, release: Release, ours: _Opened, bill: bytes
) -> tuple[Check, Check]:
    """Every member, compared with the official wheel and the patched source tree."""
    result = workspace.apply(release).require()
    official = workspace.fetcher.fetch(release, "wheel", check=True)
    with official.open("rb") as stream:
        theirs = _open(official, stream)
        plan = plan_wheel(workspace, release, result, stream, list(theirs.by_name.values()), bill)
        return (
            _run("patched files", _patched(ours, plan), _count(plan)),
            _run("other files", _others(ours, theirs, plan), f"as in {official.name}"),
        )


def _against_locks(
    workspace: Workspace, release: Release, ours: _Opened, patches: Sequence[Patch], info: str
) -> tuple[Check, Check]:
    """Every member, compared with the digests in VERSIONS.toml."""
    told = "by VERSIONS.toml; --official compares bytes, and names what differs"
    try:
        before = on_files.take_back(patches, ours.read)
    except MisfitError as error:
        untold = "they can't be told from patched ones"
        return _run("patched files", [str(error)], told), _run("other files", [untold], told)
    found = Changes.between(before, {name: ours.read(name) for name in before})
    return (
        _run("patched files", _digest(release, found), f"{len(found.kinds)}, {told}"),
        _run("other files", _rest(workspace, release, ours, before, info), told),
    )


def _digest(release: Release, found: Changes) -> Iterator[str]:
    if found.digest != release.files:
        yield f"their digest is {found.digest}, VERSIONS.toml says {release.files}"


def _rest(
    workspace: Workspace,
    release: Release,
    ours: _Opened,
    before: Mapping[str, bytes | None],
    info: str,
) -> Iterator[str]:
    """What is wrong with the files that are to be upstream's."""
    versions = workspace.versions
    old = record.dist_info(versions.upstream.project, release.name)
    if release.record is None:
        yield f"VERSIONS.toml does not lock upstream's RECORD: vllm-overlay lock {release.name}"
        return
    try:
        lines = record.read((ours.read(f"{info}/RECORD") or b"").decode())
        stated = unpatch.without_version(
            ours.read, release.name, versions.local_version(release), info
        )
    except (NotPatchedError, ValueError) as error:
        yield str(error)
        return
    rows = unpatch.official_rows(lines.values(), {**before, **stated}, old, info)
    for name, *_ in rows:
        if record.is_installers(name, old) and name != f"{old}/RECORD":
            yield f"{name} is no file that a wheel has"
    if record.pins(rows, old) != (release.record, release.record_python):
        yield "they are not those of the official wheel's RECORD"


def _open(path: Path, stream: IO[bytes]) -> _Opened:
    return _Opened(path, stream, {m.name: m for m in rawzip.members(stream, path.name)})


def _run(name: str, problems: Iterable[str], detail: str) -> Check:
    return Check(name, detail, tuple(problems))


def _count(plan: Plan) -> str:
    return f"{len(plan.replaced)} changed, {len(plan.added)} added, {len(plan.removed)} removed"


def _record(path: Path) -> Iterator[str]:
    try:
        with WheelFile.open(path) as source:
            source.validate_record(validate_contents=True)
    except Exception as error:  # installer's own classes of what is wrong with a wheel
        lines: object = getattr(error, "issues", None)
        yield from (str(line) for line in (lines if isinstance(lines, list) else [error]))


def _version(opened: _Opened, dist_info: str, wanted: str) -> Iterator[str]:
    folders = {n.split("/")[0] for n in opened.by_name if ".dist-info/" in n}
    if folders != {dist_info}:
        yield f"the dist-info folder is {sorted(folders)}, not {dist_info}"
    if opened.path.name.split("-")[1] != wanted:
        yield f"the file name says {opened.path.name.split('-')[1]}, not {wanted}"
    metadata = HeaderParser().parsestr((opened.read(f"{dist_info}/METADATA") or b"").decode())
    if metadata["Version"] != wanted:
        yield f"METADATA says {metadata['Version']}, not {wanted}"
    stated = _module_version((opened.read(stated_version.VERSION_MODULE) or b"").decode())
    if stated != wanted:
        yield f"{stated_version.VERSION_MODULE} says {stated}, not {wanted}"


def _module_version(text: str) -> str | None:
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [t.id for t in node.targets if isinstance(t, ast.Name)]
            if "__version__" in names:
                return str(node.value.value)
    return None


def _patched(opened: _Opened, plan: Plan) -> Iterator[str]:
    for name, data in {**plan.replaced, **plan.added}.items():
        target = plan.target(name)
        if name.endswith(record.SBOM):
            continue  # the SBOM check's
        found = opened.read(target)
        if found is None:
            yield f"{target} is missing"
        elif found != data:
            yield f"{target} is not the patched tree's"
    for name in plan.removed & opened.by_name.keys():
        yield f"{name} should be gone"


def _others(opened: _Opened, upstream: _Opened, plan: Plan) -> Iterator[str]:
    expected = {plan.target(name): member for name, member in upstream.by_name.items()}
    record = f"{plan.new_info}/RECORD"
    ours = {plan.target(n) for n in {**plan.replaced, **plan.added}}
    for name in sorted(opened.by_name.keys() - expected.keys() - ours):
        yield f"{name} is in neither the official wheel nor the patches"
    for name, member in expected.items():
        if name in ours or name == record or name in plan.removed:
            continue
        if name not in opened.by_name:
            yield f"{name} is missing"
        elif not _same_bytes(opened.stream, opened.by_name[name], upstream.stream, member):
            yield f"{name} differs from the official wheel's"


def _same_bytes(one: IO[bytes], a: Member, other: IO[bytes], b: Member) -> bool:
    """Whether two members hold the same compressed bytes."""
    if (a.method, a.crc, a.size, a.compressed_size) != (b.method, b.crc, b.size, b.compressed_size):
        return False
    pairs = zip(rawzip.chunks(one, a), rawzip.chunks(other, b), strict=True)
    return all(x == y for x, y in pairs)


def _sbom(opened: _Opened, info: str, bill: bytes) -> Iterator[str]:
    name = f"{info}/sboms/{record.SBOM}"
    found = opened.read(name)
    if found is None:
        yield f"{name} is missing"
        return
    if why := sbom.schema_error(found):
        yield f"{name} is no CycloneDX {sbom.SCHEMA.to_version()} document: {why}"
    if found != bill:
        yield f"{name} does not say what this checkout's VERSIONS.toml and patches say"

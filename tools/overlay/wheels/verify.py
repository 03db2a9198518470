"""Is this wheel what it says it is? Proved against this repository.

The checks, in the order they are printed:

- sha256: the one that VERSIONS.toml locks, of what `build` writes anywhere;
- zip file: byte for byte what `build` writes around these members;
- RECORD: every file listed, hashed and sized right, by the `installer` library; nothing else
  listed, and written as `build` does;
- version: the same in the file name, the dist-info folder, METADATA and vllm/_version.py;
- patched files: what the locked patches make of upstream's;
- other files: upstream's;
- official wheel, or source wheel: byte for byte what `build` makes of it;
- SBOM: valid CycloneDX, and what it says is what was checked.

A wheel that was made of another build's (`build --wheel`) has no sum in VERSIONS.toml. In place of
the official wheel it is compared with the one it was made of, if that is given; else nothing tells
what is compiled in it, and the check says so as a problem.

Patched files are compared with the digest `files` of VERSIONS.toml; then the patches are taken back
(`on_files`, `unpatch`), and all files are compared with the digests of upstream's RECORD. For this
nothing is needed but this repository. Where the official wheel is in the cache, or asked for, the
wheel is compared with what `build` makes of it as well; that names what differs.
"""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from typing import IO

from installer.sources import WheelFile
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version

from overlay.base.console import counted
from overlay.base.digest import sha256
from overlay.base.errors import Exit, OverlayError
from overlay.patches.patch import Patch
from overlay.patches.workspace import Workspace
from overlay.releases.versions import PinnedFile, Release
from overlay.wheels import foreign, locked, rawzip, record, sbom, stated_version
from overlay.wheels.build import repack
from overlay.wheels.identity import identify, stated_wheel
from overlay.wheels.origin import Origin
from overlay.wheels.plan import Plan, file_name, plan_wheel, rewritten
from overlay.wheels.rawzip import Member


@dataclass(frozen=True)
class Check:
    """One check and what it found wrong."""

    name: str
    detail: str
    """What was compared, in a few words."""
    problems: tuple[str, ...]
    is_compared: bool = True
    """Whether there is something to compare with."""


@dataclass(frozen=True)
class _Subject:
    """What is verified, and what it was made of."""

    workspace: Workspace
    origin: Origin
    """Of another build, as the SBOM tells of it, until the wheel is at hand."""
    source: Path | None
    """The wheel that it was made of, if it is at hand."""

    @property
    def release(self) -> Release:
        return self.origin.release

    @property
    def version(self) -> str:
        return self.origin.patched_version(self.workspace.versions)

    @property
    def file_name(self) -> str:
        return file_name(self.workspace.versions, self.origin)

    @property
    def info(self) -> str:
        return record.dist_info(self.workspace.versions.upstream.project, self.version)


@dataclass(frozen=True)
class _Opened:
    path: Path
    stream: IO[bytes]
    by_name: dict[str, Member]
    """In the order of their data."""

    def read(self, name: str) -> bytes | None:
        member = self.by_name.get(name)
        return None if member is None else rawzip.read(self.stream, member)


def release_of(workspace: Workspace, path: Path) -> Release:
    """The release that a patched wheel's file name speaks of.

    Raises:
        OverlayError: no such file, or not a name that this overlay gives.
    """
    return _named(workspace, path)[0]


def _named(workspace: Workspace, path: Path) -> tuple[Release, str]:
    """Release and local label of the build that a patched wheel's file name speaks of."""
    if not path.is_file():
        raise OverlayError(
            f"no wheel at {path}", "there is no such file", "Build one with 'vllm-overlay build'",
            Exit.USAGE,
        )  # fmt: skip
    try:
        name, version, _, _ = parse_wheel_filename(path.name)
    except InvalidWheelFilename as error:
        raise _foreign(path, str(error)) from error
    found = identify(str(version), workspace.versions)
    is_ours = name == workspace.versions.upstream.project and found.kind == "patched"
    if is_ours and found.release and found.revision == found.release.revision:
        return found.release, found.label
    raise _foreign(path, f"no release of VERSIONS.toml builds {name} {version}")


def _foreign(path: Path, why: str) -> OverlayError:
    return OverlayError(
        f"{path.name} is none of this overlay's wheels",
        why,
        "Name a wheel that 'vllm-overlay build' of this checkout wrote",
        Exit.USAGE,
    )


def verify(
    workspace: Workspace, path: Path, *, official: bool = False, source: Path | None = None
) -> list[Check]:
    """Run every check on the wheel at `path`.

    It is compared with what is made of the official wheel if that is in the cache, and with
    `official` in any case; for the other checks nothing is needed but this repository. `source` is
    the wheel that it was made of, if it is at hand.

    Raises:
        OverlayError: it is none of ours, cannot be read as a zip file at all, or what it is
            compared with is unavailable, or is no wheel to compare it with.
    """
    release, label = _named(workspace, path)
    patches = workspace.patches(release)
    with path.open("rb") as stream:
        ours = _open(path, stream)
        try:
            subject = _subject(workspace, release, label, ours, source, official)
            bill = sbom.build(workspace.versions, subject.origin, patches)
            info, version = subject.info, subject.version
            checks = [
                _whole(subject, path),
                _run("zip file", _zip_file(subject, ours, rewritten(patches, info)),
                     f"as {subject.file_name} is written"),
                _run("RECORD", _record(ours, info), counted(len(ours.by_name), "file")),
                _run("version", _version(ours, info, version), version),
                *_against_locks(subject, ours, patches),
                *_against_source(subject, ours, bill),
                _bill(subject, ours, bill, counted(len(patches), "patch")),
            ]  # fmt: skip
        except zipfile.BadZipFile as error:
            raise OverlayError(
                f"{path.name} is damaged", str(error), "Build it again", Exit.INTEGRITY
            ) from error
    return checks


def _subject(
    workspace: Workspace,
    release: Release,
    label: str,
    ours: _Opened,
    source: Path | None,
    official: bool,
) -> _Subject:
    """What the wheel was made of: as its name tells, and its SBOM if it is of another build.

    Raises:
        OverlayError: `source` is not that, or the official wheel is unavailable.
    """
    if source is not None:
        origin = foreign.read(workspace, source)
        subject = _Subject(workspace, origin, source)
        if subject.file_name != ours.path.name:
            raise OverlayError(
                f"{ours.path.name} was not made of {source.name}",
                f"of that, build makes {subject.file_name}",
                "Name the wheel that its SBOM names",
                Exit.USAGE,
            )
        return subject
    for build in release.builds:
        usual = _Subject(workspace, Origin.official(build), None)
        if not label and ours.path.name == usual.file_name:
            if official or workspace.fetcher.cache.has(build.wheel):
                wheel = workspace.fetcher.fetch(build, "wheel", check=True)
                return _Subject(workspace, usual.origin, wheel)
            return usual
    return _Subject(workspace, _stated(workspace, release, label, ours), None)


def _stated(workspace: Workspace, release: Release, label: str, ours: _Opened) -> Origin:
    """The other build's wheel that the SBOM says this one was made of.

    Raises:
        OverlayError: it names none.
    """
    patched = workspace.versions.local_version(release, label)
    info = record.dist_info(workspace.versions.upstream.project, patched)
    said = stated_wheel(ours.read(f"{info}/sboms/{record.SBOM}"))
    try:
        if said is None or Version(said.version) != Version(release.labelled(label)):
            raise ValueError(f"its SBOM names no wheel of {release.labelled(label)}")
        parse_wheel_filename(said.file)
        pin = PinnedFile(file=said.file, sha256=said.sha256, size=1)  # the SBOM has no size
    except (ValueError, InvalidWheelFilename) as error:
        raise OverlayError(
            f"{ours.path.name} does not tell what it was made of",
            str(error),
            "Name that wheel with --wheel, or build it again",
            Exit.INTEGRITY,
        ) from error
    return Origin(release, said.version, "source", pin)


def _whole(subject: _Subject, path: Path) -> Check:
    if not subject.origin.is_official:
        why = "VERSIONS.toml has no sum of a wheel that is made of another build's"
        return Check("sha256", why, (), is_compared=False)
    detail = f"{path.stat().st_size} bytes, by VERSIONS.toml"
    return _run("sha256", _sum(subject.release, path), detail)


def _sum(release: Release, path: Path) -> Iterator[str]:
    if release.patched_sha256 is None:
        yield f"VERSIONS.toml does not lock it: vllm-overlay lock {release.name}"
        return
    size, found = path.stat().st_size, sha256(path)
    if (found, size) != (release.patched_sha256, release.patched_size):
        wanted = f"{release.patched_sha256}, {release.patched_size} bytes"
        yield f"it is {found}, {size} bytes; VERSIONS.toml locks {wanted}"


def _zip_file(subject: _Subject, ours: _Opened, written: Collection[str]) -> Iterator[str]:
    """What is not as `build` writes it around the members' bytes; `written` are files that it
    writes anew."""
    if ours.path.name != subject.file_name:
        yield f"the file is called {ours.path.name}, and build calls it {subject.file_name}"
    for member in ours.by_name.values():
        if member.name in written and (member.method != zipfile.ZIP_STORED or member.executable):
            yield f"{member.name} is compressed or executable, and build writes it as neither"

    def write(put: rawzip.Write) -> None:
        writer = rawzip.Writer(put)
        for member in ours.by_name.values():
            writer.copy(ours.stream, member, member.name)
        writer.close()

    at = _first_difference(ours.path, write)
    if at is not None:
        yield f"from byte {at} on ({_part(ours, at)}) it is not what build writes"


def _first_difference(path: Path, write: Callable[[rawzip.Write], None]) -> int | None:
    """Where the file at `path` differs from what `write` writes; None: nowhere."""
    with path.open("rb") as stream:
        comparer = rawzip.Comparer(stream)
        try:
            write(comparer.write)
            comparer.close()
        except rawzip.DifferentError as error:
            return error.at
    return None


def _part(ours: _Opened, at: int) -> str:
    """What a byte of the file belongs to."""
    members = [member for member in ours.by_name.values() if member.header_offset <= at]
    if not members:
        return "before the first file"
    last = members[-1]
    if at < last.offset + last.compressed_size:
        return last.name
    return f"after {last.name}"


def _against_source(subject: _Subject, ours: _Opened, bill: bytes) -> Iterator[Check]:
    """The whole file, compared with what `build` makes of the wheel that it was made of."""
    is_official, wheel = subject.origin.is_official, subject.origin.wheel
    name = "official wheel" if is_official else "source wheel"
    if subject.source is not None:
        problems, detail = _against_wheel(subject, subject.source, ours, bill)
        yield _run(name, problems, detail)
    elif not is_official and wheel is not None:
        why = (
            "nothing here tells whether its other files are those of the wheel that it was made "
            f"of; its SBOM says, of {wheel.file} with the sha256 {wheel.sha256}: name that file "
            "with --wheel"
        )
        yield Check(name, "it is not at hand", (why,), is_compared=False)


def _against_wheel(
    subject: _Subject, source: Path, ours: _Opened, bill: bytes
) -> tuple[list[str], str]:
    """What differs from what `build` makes of the wheel `source`, and what that is."""
    workspace, origin = subject.workspace, subject.origin
    result = workspace.apply(subject.release).require()
    with source.open("rb") as stream:
        theirs = _open(source, stream)
        members = list(theirs.by_name.values())
        plan = plan_wheel(workspace, origin, result, stream, members, bill)

        def write(put: rawzip.Write) -> None:
            repack(origin, stream, members, plan, put)

        at = _first_difference(ours.path, write)
        problems = [] if at is None else [*_patched(ours, plan), *_others(ours, theirs, plan)]
        if at is not None and not problems:
            problems = [f"from byte {at} on ({_part(ours, at)}) it is not what build makes of it"]
        return problems, f"{source.name}, {_count(plan)}"


def _against_locks(
    subject: _Subject, ours: _Opened, patches: Sequence[Patch]
) -> tuple[Check, Check]:
    """Every member, compared with the digests in VERSIONS.toml; of another build, Python files."""
    info, is_official = subject.info, subject.origin.is_official
    found = locked.compare(
        subject.workspace.versions, subject.release, patches, ours.read, info,
        label=subject.origin.label, other_build=not is_official,
    )  # fmt: skip
    installers = [name for name in ours.by_name if _is_installers(name, info)]
    extra = tuple(f"{name} is no file that a wheel has" for name in installers)
    told = "by VERSIONS.toml"
    rest = told if is_official else f"Python files alone, {told}"
    return (
        _run("patched files", found.patched, f"{found.changed}, {told}"),
        _run("other files", found.others + extra, rest),
    )


def _bill(subject: _Subject, ours: _Opened, bill: bytes, detail: str) -> Check:
    if not subject.origin.is_official and subject.source is None:
        detail += "; what it was made of is its own word"
    return _run("SBOM", _sbom(ours, subject.info, bill), detail)


def _is_installers(name: str, info: str) -> bool:
    """Whether an installer writes it; RECORD is the wheel's own, too."""
    return name != f"{info}/RECORD" and record.is_installers(name, info)


def _open(path: Path, stream: IO[bytes]) -> _Opened:
    return _Opened(path, stream, {m.name: m for m in rawzip.members(stream, path.name)})


def _run(name: str, problems: Iterable[str], detail: str) -> Check:
    try:
        return Check(name, detail, tuple(problems))
    except (ValueError, SyntaxError, RecursionError) as error:  # not UTF-8, say, or no Python
        return Check(name, detail, (f"a file cannot be read: {error}",))


def _count(plan: Plan) -> str:
    return f"{len(plan.replaced)} changed, {len(plan.added)} added, {len(plan.removed)} removed"


def _record(ours: _Opened, info: str) -> Iterator[str]:
    try:
        with WheelFile.open(ours.path) as source:
            source.validate_record(validate_contents=True)
    except Exception as error:  # installer's own classes of what is wrong with a wheel
        lines: object = getattr(error, "issues", None)
        yield from (str(line) for line in (lines if isinstance(lines, list) else [error]))
        return
    # It lets lines pass that are of no file, or have another hash or none.
    name = f"{info}/RECORD"
    data = ours.read(name) or b""
    rows = record.read(data.decode())
    names = list(ours.by_name)
    yield from (f"it lists {extra}, which is not in the wheel" for extra in rows.keys() - names)
    for member in ours.by_name.values():
        row = rows.get(member.name, ("", "", ""))
        is_own = member.name == name
        if row[2] != ("" if is_own else str(member.size)):
            yield f"it has another size of {member.name}"
        if not (row[1] == "" if is_own else row[1].startswith("sha256=")):
            yield f"it has no sha256 of {member.name}"
    if names[-1] != name or data != record.write([rows[each] for each in names if each in rows]):
        yield "it is not written as build writes it: in the order of the files, itself last"


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
        yield f"{name} is in neither that wheel nor the patches"
    for name, member in expected.items():
        if name in ours or name == record or name in plan.removed:
            continue
        if name not in opened.by_name:
            yield f"{name} is missing"
        elif not _same_bytes(opened.stream, opened.by_name[name], upstream.stream, member):
            yield f"{name} differs from that wheel's"


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

"""Patched wheels: the official wheel repacked, without a compiler or a GPU.

Unchanged members are copied as compressed bytes. The files the series changes are
rewritten, the version changes together in the file name, the dist-info folder, METADATA
and vllm/_version.py, an SBOM is added, and RECORD is regenerated.
"""

from __future__ import annotations

import hashlib
import re
import threading
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from overlay import atomic, rawzip, record, sbom
from overlay.console import log_for
from overlay.errors import Exit, OverlayError
from overlay.rawzip import Member
from overlay.record import Row
from overlay.sources import damaged, sha256
from overlay.tree import Result, Store
from overlay.versions import Release, Versions
from overlay.workspace import Workspace

VERSION_MODULE = "vllm/_version.py"
_RECORD_HASH = re.compile(r"sha256=[A-Za-z0-9_-]{43}")
#: What upstream's tree holds beside the package; no wheel carries it.
NOT_SHIPPED = (
    "tests/",
    "docs/",
    "examples/",
    "benchmarks/",
    ".buildkite/",
    ".github/",
    "README.md",
)


@dataclass(frozen=True)
class Changes:
    """What a series does to the files of the package."""

    replaced: Mapping[str, bytes]
    """Files with new bytes."""
    added: Mapping[str, bytes]
    """New files."""
    removed: frozenset[str]
    """Files that go."""

    @classmethod
    def between(
        cls, before: Mapping[str, bytes | None], after: Mapping[str, bytes | None]
    ) -> Changes:
        """What became of the files that were `before`; None: there is no such file."""
        there = {name: data for name, data in after.items() if data is not None}
        return cls(
            {n: data for n, data in there.items() if before[n] not in (None, data)},
            {n: data for n, data in there.items() if before[n] is None},
            frozenset(n for n, d in before.items() if d is not None and n not in there),
        )

    @property
    def kinds(self) -> dict[str, str]:
        """Path and A, M or D of each, in order of path."""
        kinds = (
            dict.fromkeys(self.added, "A")
            | dict.fromkeys(self.replaced, "M")
            | dict.fromkeys(self.removed, "D")
        )
        return dict(sorted(kinds.items()))

    @property
    def digest(self) -> str:
        """What VERSIONS.toml locks as `files`."""
        after = {**self.added, **self.replaced}
        lines = [
            f"{hashlib.sha256(after[name]).hexdigest() if name in after else '-'}  {name}\n"
            for name in self.kinds
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """What a repacked wheel has other than the official one."""

    version: str
    """The local version, e.g. 0.8.5.post1+llama4.1."""
    replaced: Mapping[str, bytes]
    """Members with new bytes."""
    added: Mapping[str, bytes]
    """New members."""
    removed: frozenset[str]
    """Members that are left out."""
    old_info: str
    """The official wheel's dist-info folder."""
    new_info: str
    """The patched wheel's."""

    def target(self, name: str) -> str:
        """What the official wheel's (or a new) member `name` is called in the patched wheel."""
        return record.moved(name, self.old_info, self.new_info)


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


def file_name(versions: Versions, release: Release) -> str:
    """Name of the patched wheel.

    The local version is escaped as PEP 427 has it: only `-` would be, and it has none.
    """
    project, _, rest = release.wheel.file.split("-", 2)
    return f"{project}-{versions.local_version(release)}-{rest}"


def dist_info(project: str, version: str) -> str:
    """Name of the dist-info folder."""
    return f"{project}-{version}.dist-info"


def build(workspace: Workspace, release: Release, folder: Path) -> Built:
    """Write the patched wheel of `release` into `folder`, atomically.

    Raises:
        OverlayError: the series does not apply or is not as locked, it changes what repacking
            can't (see `plan`), the official wheel is damaged, or `folder` can't be written.
    """
    log = log_for(release.name)
    result = demand_locked(workspace, release)
    source = workspace.fetcher.fetch(release, "wheel")
    patches = [a.patch for a in result.applied if a.patch]
    bill = sbom.build(workspace.versions, release, patches)
    try:
        with source.open("rb", buffering=0) as stream:
            members = rawzip.members(stream, source.name)
            what = plan(workspace, release, result, stream, members, bill)
            log.info("repacking %s, patches: %d", source.name, len(patches))
            target = folder / file_name(workspace.versions, release)
            built = _write_atomically(release, source, stream, members, what, target)
    except zipfile.BadZipFile as error:
        if sha256(source) != release.wheel.sha256:
            raise damaged(release.name, source) from error
        raise _not_vllm(release, str(error)) from error
    return Built(target, *built)


def demand_locked(workspace: Workspace, release: Release) -> Result:
    """The release with its series applied, if that is the tree locked in VERSIONS.toml.

    Raises:
        OverlayError: a patch does not apply, or the tree is another one.
    """
    result = workspace.apply(release).demand()
    if result.tree != release.tree:
        raise OverlayError(
            f"{release.name}: the patched tree is not the one locked",
            f"it is {result.tree}, VERSIONS.toml says {release.tree}",
            f"Undo the change of the patches, or run 'vllm-overlay lock {release.name}'",
            Exit.INTEGRITY,
        )
    return result


def plan(
    workspace: Workspace,
    release: Release,
    result: Result,
    stream: IO[bytes],
    members: Sequence[Member],
    bill: bytes,
) -> Plan:
    """What to change in the official wheel so that it holds the patched tree.

    Raises:
        OverlayError: the series changes something that is not a plain file of the wheel:
            compiled sources, the build's own files, package data that is not shipped, or
            a file whose text in the wheel is not the sdist's.
    """
    by_name = {member.name: member for member in members}
    store = workspace.store
    changes = shipped(store, result)
    for path, how in changes.kinds.items():
        member = by_name.get(path)
        demand_repackable(release, path, how, member is not None)
        if member is not None:
            _demand_same_base(store, release, result, path, stream, member)

    def read(name: str) -> str:
        return _text(stream, by_name, name, release)

    return complete(workspace.versions, release, changes, bill, read)


def shipped(store: Store, result: Result) -> Changes:
    """What the series does to files that a wheel may carry."""
    replaced, added, removed = {}, {}, set()
    for path, how in sorted(store.changed(result.base, result.head).items()):
        if path.startswith(NOT_SHIPPED):
            continue
        data = store.show(result.head, path)
        if data is None:
            removed.add(path)
        elif how == "A":
            added[path] = data
        else:
            replaced[path] = data
    return Changes(replaced, added, frozenset(removed))


def complete(
    versions: Versions,
    release: Release,
    changes: Changes,
    bill: bytes,
    read: Callable[[str], str],
) -> Plan:
    """The changes with what goes with them: the version and the SBOM `bill`.

    `read` gives the text of a file of the official wheel.

    Raises:
        OverlayError: a file does not state the version as expected.
    """
    version, project = versions.local_version(release), versions.upstream.project
    old = dist_info(project, release.name)
    stated = {
        VERSION_MODULE: set_module_version(read(VERSION_MODULE), release.name, version),
        f"{old}/METADATA": set_metadata_version(read(f"{old}/METADATA"), release.name, version),
    }
    return Plan(
        version,
        {**changes.replaced, **stated},
        {**changes.added, f"{old}/sboms/{sbom.FILE_NAME}": bill},
        changes.removed,
        old,
        dist_info(project, version),
    )


def official_record(workspace: Workspace, release: Release) -> tuple[str, str]:
    """Digests of the official wheel's RECORD (`record.pins`).

    Raises:
        OverlayError: the wheel can't be had, or is no vLLM wheel.
    """
    source = workspace.fetcher.fetch(release, "wheel", check=True)
    info = dist_info(workspace.versions.upstream.project, release.name)
    with source.open("rb") as stream:
        lines = _record_of(release, stream, rawzip.members(stream, source.name), info)
    return record.pins(lines.values(), info)


def _demand_record(release: Release, lines: Iterable[Row], info: str) -> None:
    """Raise unless RECORD is the one that VERSIONS.toml locks, if it locks one."""
    found = record.pins(lines, info)
    if release.record is not None and found != (release.record, release.record_python):
        raise OverlayError(
            f"{release.name}: the official wheel's RECORD is not the one locked",
            f"its digests are {' and '.join(found)}",
            "Delete `record` and `record_python` of this release from VERSIONS.toml and run "
            f"'vllm-overlay lock {release.name}'",
            Exit.INTEGRITY,
        )


def demand_repackable(release: Release, path: str, how: str, is_in_wheel: bool) -> None:
    """Raise for a change (A, M or D) of something that is not a plain file of the wheel."""
    in_package = path.startswith("vllm/")
    if is_in_wheel and path != VERSION_MODULE:
        return
    if in_package and how == "A" and PurePosixPath(path).suffix == ".py":
        return
    why = "it is part of the build or of the compiled code"
    if in_package:
        why = "it is package data that the official wheel does not carry"
    if path == VERSION_MODULE:
        why = "the version is the build's own"
    raise _not_repackable(release, path, why)


def _demand_same_base(
    store: Store, release: Release, result: Result, path: str, stream: IO[bytes], member: Member
) -> None:
    if store.show(result.base, path) != rawzip.read(stream, member):
        why = "the official wheel has other text there than the sdist"
        raise _not_repackable(release, path, why)


def _not_repackable(release: Release, path: str, why: str) -> OverlayError:
    return OverlayError(
        f"{release.name}: a patch changes {path}, which repacking cannot",
        why,
        f"Build from source: vllm-overlay build {release.name} --source --target cuda",
        Exit.PATCH,
    )


def _text(stream: IO[bytes], by_name: Mapping[str, Member], name: str, release: Release) -> str:
    try:
        return rawzip.read(stream, by_name[name]).decode()
    except KeyError as error:
        raise _not_vllm(release, f"there is no {name} in it") from error
    except UnicodeDecodeError as error:
        raise _not_vllm(release, f"its {name} is not UTF-8") from error


def _not_vllm(release: Release, why: str) -> OverlayError:
    return OverlayError(
        f"{release.wheel.file} is no vLLM wheel",
        why,
        "Delete it from the cache and run the command again",
        Exit.INTEGRITY,
    )


def set_module_version(text: str, old: str, new: str) -> bytes:
    """vllm/_version.py with `new` in place of `old`, as setuptools-scm writes a local version.

    >>> text = "__version__ = version = '1.0'\\n__version_tuple__ = version_tuple = (1, 0)\\n"
    >>> print(set_module_version(text, "1.0", "1.0+a.1").decode(), end="")
    __version__ = version = '1.0+a.1'
    __version_tuple__ = version_tuple = (1, 0, 'a.1')
    """
    local = new.removeprefix(f"{old}+")
    text, strings = re.subn(
        rf"(?m)^(__version__ = version = )'{re.escape(old)}'$", rf"\g<1>'{new}'", text
    )
    text, tuples = re.subn(
        r"(?m)^(__version_tuple__ = version_tuple = \([^)\n]+)\)$", rf"\g<1>, '{local}')", text
    )
    if (strings, tuples) != (1, 1):
        raise OverlayError(
            f"cannot set the version in {VERSION_MODULE}",
            f"it does not state {old!r} the way setuptools-scm does",
            "Report it: this release needs its own rule",
            Exit.PATCH,
        )
    return text.encode()


def set_metadata_version(text: str, old: str, new: str) -> bytes:
    """METADATA (or PKG-INFO) with `new` in place of `old` in its header.

    >>> set_metadata_version("Name: x\\nVersion: 1\\n\\nVersion: 1\\n", "1", "1+a.1")
    b'Name: x\\nVersion: 1+a.1\\n\\nVersion: 1\\n'
    """
    head, blank, body = text.partition("\n\n")
    head, count = re.subn(rf"(?m)^Version: {re.escape(old)}$", f"Version: {new}", head)
    if count != 1:
        raise OverlayError(
            "cannot set the version in METADATA",
            f"it does not state Version: {old} once",
            "Report it: this release needs its own rule",
            Exit.PATCH,
        )
    return (head + blank + body).encode()


def _record_of(
    release: Release, stream: IO[bytes], members: Sequence[Member], info: str
) -> dict[str, Row]:
    """The official wheel's RECORD, if it speaks of `members`; `info` is its dist-info folder.

    The hashes are upstream's word, which the pin of the whole file covers; `verify` checks them.
    """
    own, by_name = f"{info}/RECORD", {member.name: member for member in members}
    try:
        lines = record.read(_text(stream, by_name, own, release))
    except ValueError as error:
        raise _not_vllm(release, f"its RECORD is broken ({error})") from error
    for name, member in by_name.items():
        if name == own:
            continue
        if name not in lines:
            raise _not_vllm(release, f"its RECORD does not list {name}")
        _, digest, size = lines[name]
        if not _RECORD_HASH.fullmatch(digest) or size != str(member.size):
            raise _not_vllm(release, f"its RECORD is wrong about {name}")
    if absent := sorted(lines.keys() - by_name.keys()):
        raise _not_vllm(release, f"its RECORD lists {absent[0]!r}, which is not in it")
    return lines


def _write_atomically(
    release: Release,
    source: Path,
    stream: IO[bytes],
    members: Sequence[Member],
    what: Plan,
    target: Path,
) -> tuple[str, int]:
    """Write the wheel, whole or not at all. Returns its sha256 and size."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic.writing(target) as out, _Sha256OfFile(source) as check:
            digest = hashlib.sha256()

            def write(data: bytes) -> None:
                out.write(data)
                digest.update(data)

            repack(release, stream, members, what, write)
            if check.hexdigest() != release.wheel.sha256:
                raise damaged(release.name, source)
            size = out.tell()
    except (OSError, OverflowError) as error:
        raise unwritable(release, target, error) from error
    return digest.hexdigest(), size


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
    release: Release,
    stream: IO[bytes],
    members: Sequence[Member],
    what: Plan,
    write: rawzip.Write,
) -> None:
    """Write the repacked wheel through `write`. The invariants:

    - members stand in the official wheel's order; new ones of the package, sorted, before
      the dist-info folder, new ones of dist-info at its end, RECORD last;
    - an unchanged member keeps its compressed bytes and its line in RECORD;
    - a changed or new one is stored uncompressed, with a fresh line in RECORD;
    - times, modes and flags are `rawzip.Writer`'s, so the bytes depend on the official wheel
      and the plan alone.
    """
    old, record_name = what.old_info, f"{what.new_info}/RECORD"
    lines = _record_of(release, stream, members, old)
    _demand_record(release, lines.values(), old)
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

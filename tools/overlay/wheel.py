"""Patched wheels: the official wheel repacked, without a compiler or a GPU.

Unchanged members are copied as compressed bytes. The files the series changes are
rewritten, the version changes together in the file name, the dist-info folder, METADATA
and vllm/_version.py, an SBOM is added, and RECORD is regenerated.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import tempfile
import threading
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from overlay import rawzip, sbom
from overlay.console import log_for
from overlay.errors import Exit, OverlayError
from overlay.rawzip import Member
from overlay.sources import damaged, sha256
from overlay.tree import Result, Store
from overlay.versions import Release, Versions
from overlay.workspace import Workspace

VERSION_MODULE = "vllm/_version.py"
#: What upstream's tree holds beside the package; no wheel carries it.
_NOT_SHIPPED = (
    "tests/",
    "docs/",
    "examples/",
    "benchmarks/",
    ".buildkite/",
    ".github/",
    "README.md",
)


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
        inside = name.removeprefix(f"{self.old_info}/")
        return name if inside == name else f"{self.new_info}/{inside}"


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
    with source.open("rb", buffering=0) as stream:
        members = rawzip.members(stream, source.name)
        what = plan(workspace, release, result, stream, members, bill)
        log.info("repacking %s, patches: %d", source.name, len(patches))
        target = folder / file_name(workspace.versions, release)
        built = _write_atomically(release, source, stream, members, what, target)
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
    replaced, added, removed = {}, {}, set()
    store = workspace.store
    for path, how in sorted(store.changed(result.base, result.head).items()):
        if path.startswith(_NOT_SHIPPED):
            continue
        member = by_name.get(path)
        _demand_repackable(release, path, how, member)
        if member is not None:
            _demand_same_base(store, release, result, path, stream, member)
        data = store.show(result.head, path)
        if data is None:
            removed.add(path)
        elif member is None:
            added[path] = data
        else:
            replaced[path] = data
    version = workspace.versions.local_version(release)
    project = workspace.versions.upstream.project
    old = dist_info(project, release.name)
    replaced[VERSION_MODULE] = set_module_version(
        _text(stream, by_name, VERSION_MODULE, release), release.name, version
    )
    replaced[f"{old}/METADATA"] = set_metadata_version(
        _text(stream, by_name, f"{old}/METADATA", release), release.name, version
    )
    added[f"{old}/sboms/{sbom.FILE_NAME}"] = bill
    return Plan(version, replaced, added, frozenset(removed), old, dist_info(project, version))


def _demand_repackable(release: Release, path: str, how: str, member: Member | None) -> None:
    in_package = path.startswith("vllm/")
    if member is not None and path != VERSION_MODULE:
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


def record_line(name: str, data: bytes) -> tuple[str, str, str]:
    """A file's line in RECORD."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return name, f"sha256={digest}", str(len(data))


def read_record(text: str) -> dict[str, tuple[str, str, str]]:
    """RECORD's lines by file name."""
    return {row[0]: (row[0], row[1], row[2]) for row in csv.reader(io.StringIO(text)) if row}


def _format_record(rows: Sequence[tuple[str, str, str]]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().encode()


def _write_atomically(
    release: Release,
    source: Path,
    stream: IO[bytes],
    members: Sequence[Member],
    what: Plan,
    target: Path,
) -> tuple[str, int]:
    """Write the wheel beside `target` and rename it. Returns its sha256 and size."""
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # No lock: the temporary's name is unique, and two builds rename the same bytes.
        handle, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb", buffering=0) as out, _Sha256OfFile(source) as check:
            digest = hashlib.sha256()

            def write(data: bytes) -> None:
                out.write(data)
                digest.update(data)

            repack(release, stream, members, what, write)
            if check.hexdigest() != release.wheel.sha256:
                raise damaged(release.name, source)
            os.fsync(out.fileno())
            size = out.tell()
        temporary.chmod(0o644)
        temporary.replace(target)
    except (OSError, OverflowError, zipfile.BadZipFile) as error:
        if isinstance(error, zipfile.BadZipFile):
            raise damaged(release.name, source) from error
        raise unwritable(release, target, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
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
    by_name = {member.name: member for member in members}
    record = read_record(_text(stream, by_name, f"{old}/RECORD", release))
    rows: list[tuple[str, str, str]] = []
    writer = rawzip.Writer(write)

    def store(name: str, data: bytes) -> None:
        target = what.target(name)
        writer.store(target, data)
        rows.append(record_line(target, data))

    def copy(member: Member) -> None:
        if member.name not in record:
            raise _not_vllm(release, f"its RECORD does not list {member.name}")
        target = what.target(member.name)
        writer.copy(stream, member, target)
        rows.append((target, *record[member.name][1:]))

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
    writer.store(record_name, _format_record(rows))
    writer.close()

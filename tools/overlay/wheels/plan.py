"""What a patched wheel has other than the one that it is made of, the official one mostly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

from overlay.base.errors import Exit, OverlayError
from overlay.patches.changes import Changes, shipped
from overlay.patches.patch import Patch
from overlay.patches.tree import Result
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release, Versions
from overlay.wheels import rawzip, record
from overlay.wheels.official import text_of
from overlay.wheels.origin import Origin
from overlay.wheels.rawzip import Member
from overlay.wheels.record import dist_info
from overlay.wheels.stated_version import VERSION_MODULE, set_in_metadata, set_in_module


@dataclass(frozen=True)
class Plan:
    """What a repacked wheel has other than the one that it is made of."""

    version: str
    """The patched version, e.g. 0.8.5.post1+llama4.1."""
    replaced: Mapping[str, bytes]
    """Members with new bytes."""
    added: Mapping[str, bytes]
    """New members."""
    removed: frozenset[str]
    """Members that are left out."""
    old_info: str
    """That wheel's dist-info folder."""
    new_info: str
    """The patched wheel's."""

    def target(self, name: str) -> str:
        """What that wheel's (or a new) member `name` is called in the patched wheel."""
        return record.moved(name, self.old_info, self.new_info)


def file_name(versions: Versions, origin: Origin) -> str:
    """Name of the wheel that is made of the wheel `origin`, whose tags it keeps.

    The local version is escaped as PEP 427 has it: only `-` would be, and it has none.
    """
    assert origin.wheel is not None
    project, _, rest = origin.wheel.file.split("-", 2)
    return f"{project}-{origin.patched_version(versions)}-{rest}"


def plan_wheel(
    workspace: Workspace,
    origin: Origin,
    result: Result,
    stream: IO[bytes],
    members: Sequence[Member],
    bill: bytes,
) -> Plan:
    """What to change in the wheel `origin` so that it holds the patched tree.

    Raises:
        OverlayError: the series changes something that is not a plain file of the wheel:
            compiled sources, the build's own files, package data that is not shipped, or
            a file whose text in the wheel is not the sdist's.
    """
    by_name = {member.name: member for member in members}
    store, release = workspace.store, origin.release
    changes = shipped(store, result)
    for path, how in changes.kinds.items():
        require_repackable(release, path, how, path in by_name)
    in_wheel = [path for path in changes.kinds if path in by_name]
    for path, data in store.show_many(result.base, in_wheel).items():
        if data != rawzip.read(stream, by_name[path]):
            why = "the wheel has other text there than the sdist"
            raise _not_repackable(release, path, why)

    def read(name: str) -> str:
        return text_of(stream, by_name, name, origin)

    return complete(workspace.versions, origin, changes, bill, read)


def complete(
    versions: Versions,
    origin: Origin,
    changes: Changes,
    bill: bytes,
    read: Callable[[str], str],
) -> Plan:
    """The changes with what goes with them: the version and the SBOM `bill`.

    `read` gives the text of a file of `origin`.

    Raises:
        OverlayError: a file does not state the version as expected.
    """
    version, old = origin.patched_version(versions), origin.info(versions)
    stated = {
        VERSION_MODULE: set_in_module(read(VERSION_MODULE), origin.release.name, version),
        f"{old}/METADATA": set_in_metadata(read(f"{old}/METADATA"), origin.version, version),
    }
    return Plan(
        version,
        {**changes.replaced, **stated},
        {**changes.added, f"{old}/sboms/{record.SBOM}": bill},
        changes.removed,
        old,
        dist_info(versions.upstream.project, version),
    )


def rewritten(patches: Sequence[Patch], info: str) -> frozenset[str]:
    """The files that a build writes anew; `info` is the patched wheel's dist-info folder."""
    metadata = (f"{info}/{name}" for name in ("METADATA", "RECORD", f"sboms/{record.SBOM}"))
    touched = (file.path for patch in patches for file in patch.files)
    return frozenset((VERSION_MODULE, *metadata, *touched))


def require_repackable(release: Release, path: str, how: str, is_in_wheel: bool) -> None:
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


class NotRepackableError(OverlayError):
    """The series changes what a repacked wheel can't have."""


def _not_repackable(release: Release, path: str, why: str) -> NotRepackableError:
    return NotRepackableError(
        f"{release.name}: a patch changes {path}, which repacking cannot",
        why,
        f"Build from source: vllm-overlay build {release.name} --source --target cuda",
        Exit.PATCH,
    )

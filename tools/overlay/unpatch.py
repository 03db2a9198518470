"""What the official wheel said, worked out from a patched one and this repository alone.

The patches are taken back from the files that they changed, and the version from those that state
it. With them RECORD is upstream's again, hash by hash, and VERSIONS.toml locks its digest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from overlay import record, sbom, wheel
from overlay.errors import OverlayError
from overlay.hunks import MatchKind, apply_hunks
from overlay.patch import Patch
from overlay.record import Row
from overlay.tree import describe
from overlay.wheel import Changes

Read = Callable[[str], bytes | None]
"""The bytes of a file, by its path; None if there is no such file."""


class NotPatchedError(Exception):
    """A file is not what the patches make of anything; the message says which and why."""


def originals(patches: Sequence[Patch], read: Read) -> dict[str, bytes | None]:
    """What the files were that `patches` changed, None for those that they added.

    Raises:
        NotPatchedError: a patch can't be taken back.
    """
    found: dict[str, str | None] = {}
    for patch in reversed(patches):
        for file in patch.files:
            if file.path.startswith(wheel.NOT_SHIPPED):
                continue
            if file.path not in found:
                found[file.path] = _text(read(file.path))
            found[file.path], matches = apply_hunks(file.reversed(), found[file.path])
            bad = [m for m in matches if m.kind in (MatchKind.CONFLICT, MatchKind.AMBIGUOUS)]
            if bad:
                raise NotPatchedError(f"{patch.path}: {'; '.join(map(describe, bad))}")
    return {path: _data(text) for path, text in found.items()}


def changes(before: Mapping[str, bytes | None], read: Read) -> Changes:
    """What became of the files that were `before`."""
    after = {path: read(path) for path in before}
    return Changes(
        {p: d for p, d in after.items() if d is not None and before[p] not in (None, d)},
        {p: d for p, d in after.items() if d is not None and before[p] is None},
        frozenset(p for p, d in after.items() if d is None and before[p] is not None),
    )


def official_rows(
    rows: Iterable[Row], before: Mapping[str, bytes | None], old: str, new: str
) -> list[Row]:
    """The official wheel's RECORD from a patched one's.

    `before` has the bytes of each file that is another one there, None if it is not there; `old`
    and `new` are the dist-info folders of the two.
    """
    named = [(_renamed(name, new, old), *rest) for name, *rest in rows]
    kept = [(name, digest, size) for name, digest, size in named if name not in before]
    bill = f"{old}/sboms/{sbom.FILE_NAME}"
    restored = [record.line(name, data) for name, data in before.items() if data is not None]
    return [row for row in kept if row[0] != bill] + restored


def without_version(read: Read, release: str, version: str, info: str) -> dict[str, bytes | None]:
    """The files that state the version as they were, by their path in the official wheel.

    `info` is the patched wheel's dist-info folder.

    Raises:
        NotPatchedError: one of them does not state it as a build of this overlay does.
    """
    module, metadata = _text(read(wheel.VERSION_MODULE)), _text(read(f"{info}/METADATA"))
    local = version.removeprefix(f"{release}+")
    old = _renamed(f"{info}/METADATA", info, info.replace(f"-{version}.", f"-{release}."))
    plain = (module or "").replace(f"'{version}'", f"'{release}'").replace(f", '{local}')", ")")
    header, blank, body = (metadata or "").partition("\n\n")
    stated = header.replace(f"Version: {version}", f"Version: {release}") + blank + body
    for name, text, now, set_version in (
        (wheel.VERSION_MODULE, plain, module, wheel.set_module_version),
        (old, stated, metadata, wheel.set_metadata_version),
    ):
        try:
            again = set_version(text, release, version)
        except OverlayError as error:
            raise NotPatchedError(str(error)) from error
        if again != _data(now):
            raise NotPatchedError(f"{name} does not state the version {version} as it should")
    return {wheel.VERSION_MODULE: _data(plain), old: _data(stated)}


def _renamed(name: str, old: str, new: str) -> str:
    inside = name.removeprefix(f"{old}/")
    return name if inside == name else f"{new}/{inside}"


def _text(data: bytes | None) -> str | None:
    return None if data is None else data.decode("utf-8", "surrogateescape")


def _data(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "surrogateescape")

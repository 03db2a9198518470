"""Whether files are those of a patched wheel, told by what VERSIONS.toml locks: of a wheel, or of
an installation.

Patched files are compared with the digest `files`; then the patches are taken back (`on_files`,
`unpatch`), and RECORD with that is compared with the digests of upstream's. So RECORD is proved
too: whoever calls this compares the files with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from overlay.patches.changes import Changes
from overlay.patches.patch import Patch
from overlay.releases.versions import Release, Versions
from overlay.wheels import on_files, record, stated_version, unpatch
from overlay.wheels.on_files import MisfitError, Read
from overlay.wheels.origin import match
from overlay.wheels.record import Row
from overlay.wheels.unpatch import NotPatchedError


@dataclass(frozen=True)
class Comparison:
    """What was found wrong."""

    patched: tuple[str, ...]
    """With the files that patches change."""
    others: tuple[str, ...]
    """With all others, as RECORD lists them."""
    changed: int
    """How many files patches change."""


def compare(
    versions: Versions,
    release: Release,
    patches: Sequence[Patch],
    read: Read,
    info: str,
    *,
    label: str = "",
    other_build: bool = False,
) -> Comparison:
    """Compare the files that `read` gives; `info` is their dist-info folder.

    Of an `other_build`, whose local version was `label`, Python files alone are upstream's.
    """
    try:
        before = on_files.take_back(patches, read)
    except MisfitError as error:
        return Comparison((str(error),), ("they can't be told from patched ones",), 0)
    found = Changes.between(before, {name: read(name) for name in before})
    return Comparison(
        tuple(_digest(release, found)),
        tuple(_rest(versions, release, read, before, info, label, other_build)),
        len(found.kinds),
    )


def _written(info: str) -> tuple[str, ...]:
    """The files that are written anew whatever the patches are, RECORD apart."""
    return stated_version.VERSION_MODULE, f"{info}/METADATA", f"{info}/sboms/{record.SBOM}"


def _unlisted(lines: Mapping[str, Row], read: Read, names: Iterable[str]) -> Iterator[str]:
    """What RECORD's `lines` say of the files that are not upstream's, and is not so."""
    for name in names:
        data, stated = read(name), lines.get(name, ("", "", ""))[1]
        if stated != ("" if data is None else record.line(name, data)[1]):
            yield f"RECORD does not list {name} as it is"


def _digest(release: Release, found: Changes) -> Iterator[str]:
    if found.digest != release.files:
        yield f"their digest is {found.digest}, VERSIONS.toml says {release.files}"


def _rest(
    versions: Versions,
    release: Release,
    read: Read,
    before: Mapping[str, bytes | None],
    info: str,
    label: str,
    other_build: bool,
) -> Iterator[str]:
    """What is wrong with the files that are to be upstream's."""
    was, version = release.labelled(label), versions.local_version(release, label)
    old = record.dist_info(versions.upstream.project, was)
    if release.record is None:
        yield f"VERSIONS.toml does not lock upstream's RECORD: vllm-overlay lock {release.name}"
        return
    try:
        lines = record.read((read(f"{info}/RECORD") or b"").decode())
        stated = unpatch.without_version(read, release.name, was, version, info)
    except (NotPatchedError, ValueError) as error:
        yield str(error)
        return
    yield from _unlisted(lines, read, (*before, *_written(info)))
    rows = unpatch.official_rows(lines.values(), {**before, **stated}, old, info)
    found = match(release, record.pins(rows, old))
    if found is None or (found[1] != "all" and not other_build):
        yield "they are not those of the official wheel's RECORD"

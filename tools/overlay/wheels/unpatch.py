"""What the official wheel said, worked out from a patched one and this repository alone.

The patches are taken back from the files that they changed (`on_files`), and here the version from
those that state it. With them RECORD is upstream's again, hash by hash, and VERSIONS.toml locks its
digest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from overlay.base.errors import OverlayError
from overlay.patches.hunks import to_bytes, to_text
from overlay.wheels import record, stated_version
from overlay.wheels.on_files import Read
from overlay.wheels.record import Row


class NotPatchedError(Exception):
    """A file does not state the version as a patched one does; the message says which."""


def official_rows(
    rows: Iterable[Row], before: Mapping[str, bytes | None], old: str, new: str
) -> list[Row]:
    """The official wheel's RECORD from a patched one's.

    `before` has the bytes of each file that is another one there, None if it is not there; `old`
    and `new` are the dist-info folders of the two.
    """
    named = [(record.moved(name, new, old), *rest) for name, *rest in rows]
    kept = [(name, digest, size) for name, digest, size in named if name not in before]
    bill = f"{old}/sboms/{record.SBOM}"
    restored = [record.line(name, data) for name, data in before.items() if data is not None]
    return [row for row in kept if row[0] != bill] + restored


def without_version(
    read: Read, release: str, before: str, version: str, info: str
) -> dict[str, bytes | None]:
    """The files that state the version as they were, by their path in what was patched.

    `before` is its version, `version` and `info` are the patched one's and its dist-info folder.
    What vllm/_version.py of another build had stated nothing tells: here it is that of `release`.

    Raises:
        NotPatchedError: one of them does not state it as a build of this overlay does.
    """
    module, metadata = (
        to_text(read(stated_version.VERSION_MODULE)),
        to_text(read(f"{info}/METADATA")),
    )
    local = version.removeprefix(f"{release}+")
    old = record.moved(f"{info}/METADATA", info, info.replace(f"-{version}.", f"-{before}."))
    plain = (module or "").replace(f"'{version}'", f"'{release}'").replace(f", '{local}')", ")")
    header, blank, body = (metadata or "").partition("\n\n")
    stated = header.replace(f"Version: {version}", f"Version: {before}") + blank + body
    for name, text, now, was, set_version in (
        (stated_version.VERSION_MODULE, plain, module, release, stated_version.set_in_module),
        (old, stated, metadata, before, stated_version.set_in_metadata),
    ):
        try:
            again = set_version(text, was, version)
        except OverlayError as error:
            raise NotPatchedError(str(error)) from error
        if again != to_bytes(now):
            raise NotPatchedError(f"{name} does not state the version {version} as it should")
    return {stated_version.VERSION_MODULE: to_bytes(plain), old: to_bytes(stated)}

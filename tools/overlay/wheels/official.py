"""The official wheel: its RECORD, which VERSIONS.toml locks, and the text of its files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import IO

from overlay.base.errors import Exit, OverlayError
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release
from overlay.wheels import rawzip, record
from overlay.wheels.origin import Origin
from overlay.wheels.rawzip import Member
from overlay.wheels.record import Pins, Row, dist_info

_RECORD_HASH = re.compile(r"sha256=[A-Za-z0-9_-]{43}")


def record_digests(workspace: Workspace, release: Release) -> Pins:
    """Digests of the official wheel's RECORD.

    Raises:
        OverlayError: the wheel is unavailable, or is no vLLM wheel.
    """
    source = workspace.fetcher.fetch(release, "wheel", check=True)
    info = dist_info(workspace.versions.upstream.project, release.name)
    with source.open("rb") as stream:
        members = rawzip.members(stream, source.name)
        lines = record_of(Origin.official(release), stream, members, info)
    return record.pins(lines.values(), info)


def require_locked(release: Release, lines: Iterable[Row], info: str) -> None:
    """Raise unless RECORD is the one that VERSIONS.toml locks, if it locks one."""
    found = record.pins(lines, info)
    locked = (release.record, release.record_python, release.record_source)
    if any(digest not in (None, pin) for digest, pin in zip(locked, found, strict=True)):
        raise OverlayError(
            f"{release.name}: the official wheel's RECORD is not the one locked",
            f"its digests are {', '.join(found)}",
            "Delete `record`, `record_python` and `record_source` of this release from "
            f"VERSIONS.toml and run 'vllm-overlay lock {release.name}'",
            Exit.INTEGRITY,
        )


def text_of(stream: IO[bytes], by_name: Mapping[str, Member], name: str, origin: Origin) -> str:
    """The text of the member `name` of the wheel `origin`.

    Raises:
        OverlayError: there is none, or it is not UTF-8.
    """
    try:
        return rawzip.read(stream, by_name[name]).decode()
    except KeyError as error:
        raise origin.refused(f"there is no {name} in it") from error
    except UnicodeDecodeError as error:
        raise origin.refused(f"its {name} is not UTF-8") from error


def record_of(
    origin: Origin, stream: IO[bytes], members: Sequence[Member], info: str
) -> dict[str, Row]:
    """The RECORD of the wheel `origin`, if it speaks of `members`; `info` is its dist-info folder.

    The hashes are its builder's word: of the official wheel, the pin of the whole file covers
    them, and `verify` checks them.

    Raises:
        OverlayError: there is none, it can't be read, or a member is not in it or it lists others.
    """
    own, by_name = f"{info}/RECORD", {member.name: member for member in members}
    try:
        lines = record.read(text_of(stream, by_name, own, origin))
    except ValueError as error:
        raise origin.refused(f"its RECORD is broken ({error})") from error
    for name, member in by_name.items():
        if name == own:
            continue
        if name not in lines:
            raise origin.refused(f"its RECORD does not list {name}")
        _, digest, size = lines[name]
        if not _RECORD_HASH.fullmatch(digest) or size != str(member.size):
            raise origin.refused(f"its RECORD is wrong about {name}")
    if absent := sorted(lines.keys() - by_name.keys()):
        raise origin.refused(f"its RECORD lists {absent[0]!r}, which is not in it")
    return lines

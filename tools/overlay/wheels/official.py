"""The official wheel: its RECORD, which VERSIONS.toml locks, and the text of its files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import IO

from overlay.base.errors import Exit, OverlayError
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release
from overlay.wheels import rawzip, record
from overlay.wheels.rawzip import Member
from overlay.wheels.record import Row, dist_info

_RECORD_HASH = re.compile(r"sha256=[A-Za-z0-9_-]{43}")


def record_digests(workspace: Workspace, release: Release) -> tuple[str, str]:
    """Digests of the official wheel's RECORD (`record.pins`).

    Raises:
        OverlayError: the wheel is unavailable, or is no vLLM wheel.
    """
    source = workspace.fetcher.fetch(release, "wheel", check=True)
    info = dist_info(workspace.versions.upstream.project, release.name)
    with source.open("rb") as stream:
        lines = record_of(release, stream, rawzip.members(stream, source.name), info)
    return record.pins(lines.values(), info)


def require_locked(release: Release, lines: Iterable[Row], info: str) -> None:
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


def text_of(stream: IO[bytes], by_name: Mapping[str, Member], name: str, release: Release) -> str:
    """The text of the member `name`.

    Raises:
        OverlayError: there is none, or it is not UTF-8.
    """
    try:
        return rawzip.read(stream, by_name[name]).decode()
    except KeyError as error:
        raise not_vllm(release, f"there is no {name} in it") from error
    except UnicodeDecodeError as error:
        raise not_vllm(release, f"its {name} is not UTF-8") from error


def not_vllm(release: Release, why: str) -> OverlayError:
    """The error for a file of that name that is another wheel, or a broken one."""
    return OverlayError(
        f"{release.wheel.file} is no vLLM wheel",
        why,
        "Delete it from the cache and run the command again",
        Exit.INTEGRITY,
    )


def record_of(
    release: Release, stream: IO[bytes], members: Sequence[Member], info: str
) -> dict[str, Row]:
    """The official wheel's RECORD, if it speaks of `members`; `info` is its dist-info folder.

    The hashes are upstream's word, which the pin of the whole file covers; `verify` checks them.

    Raises:
        OverlayError: there is none, it can't be read, or a member is not in it or it lists others.
    """
    own, by_name = f"{info}/RECORD", {member.name: member for member in members}
    try:
        lines = record.read(text_of(stream, by_name, own, release))
    except ValueError as error:
        raise not_vllm(release, f"its RECORD is broken ({error})") from error
    for name, member in by_name.items():
        if name == own:
            continue
        if name not in lines:
            raise not_vllm(release, f"its RECORD does not list {name}")
        _, digest, size = lines[name]
        if not _RECORD_HASH.fullmatch(digest) or size != str(member.size):
            raise not_vllm(release, f"its RECORD is wrong about {name}")
    if absent := sorted(lines.keys() - by_name.keys()):
        raise not_vllm(release, f"its RECORD lists {absent[0]!r}, which is not in it")
    return lines

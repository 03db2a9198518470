"""The generated fields of VERSIONS.toml: tree ids and digests, written by an explicit command
only."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path

import tomlkit

from overlay.base import atomic
from overlay.base.errors import Exit, OverlayError
from overlay.patches.changes import shipped
from overlay.patches.tree import UNKNOWN_TREE, Result
from overlay.patches.workspace import Workspace
from overlay.releases.versions import Release

#: What gives the digests of a release's official RECORD: of all, Python and source files.
RecordOf = Callable[[Workspace, Release], tuple[str, str, str]]
#: What builds a release's patched wheel. Returns its sha256 and size; None: there is none.
SumOf = Callable[[Workspace, Release], "tuple[str, int] | None"]


@dataclass(frozen=True)
class Change:
    """One generated field, before and after."""

    release: str
    key: str
    """With the table that it stands in, if that is not the release's own: aarch64.record."""
    old: str | int
    new: str | int

    @property
    def is_change(self) -> bool:
        """Whether the two differ."""
        return self.old != self.new


def compute(
    workspace: Workspace,
    releases: Iterable[Release],
    record_of: RecordOf,
    sum_of: SumOf,
    done: Callable[[str], None] = lambda _: None,
) -> list[Change]:
    """The generated fields of `releases` as they are now, beside those in VERSIONS.toml.

    The digests of the official wheel's RECORD, which `record_of` gives, are as fixed as the wheel:
    they are computed where they are missing. The patched wheel's, by `sum_of`, always are, of the
    other fields as they are now. `done` hears of each release.

    Raises:
        OverlayError: a series does not apply, or a file is unavailable.
    """
    changes = []
    for release in releases:
        found: list[Change] = []
        unpinned = release.model_copy(update={"upstream_tree": UNKNOWN_TREE})
        result = workspace.apply(unpinned).require()
        base = workspace.store.tree_of(result.base)
        found.append(Change(release.name, "upstream_tree", release.upstream_tree, base))
        if release.tree is not None:
            found += of_result(workspace, result)
        if release.is_patched:
            now = {change.key: change.new for change in found}
            for build in release.model_copy(update=now).builds:
                found += _of_build(workspace, build, record_of, sum_of)
        changes += found
        done(release.name)
    return changes


def _of_build(
    workspace: Workspace, build: Release, record_of: RecordOf, sum_of: SumOf
) -> Iterator[Change]:
    """The fields that speak of an official wheel and the patched one."""
    locked = _pins(build)
    if None in locked.values():
        digests = dict(zip(locked, record_of(workspace, build), strict=True))
        yield from (_change(build, key, locked[key], new) for key, new in digests.items())
        build = build.model_copy(update=digests)
    if built := sum_of(workspace, build.model_copy(update={"patched_sha256": None})):
        sha256, size = built
        yield _change(build, "patched_sha256", build.patched_sha256, sha256)
        yield _change(build, "patched_size", build.patched_size, size)


def _change(build: Release, key: str, old: str | int | None, new: str | int) -> Change:
    table = "" if build.platform == "x86_64" else f"{build.platform}."
    return Change(build.name, table + key, old or "none", new)


def of_result(workspace: Workspace, result: Result) -> list[Change]:
    """The fields that speak of the whole series, applied."""
    release = result.release
    files = shipped(workspace.store, result).digest
    return [
        Change(release.name, "tree", str(release.tree), result.tree),
        Change(release.name, "files", release.files or "none", files),
    ]


def _pins(release: Release) -> dict[str, str | None]:
    return {
        "record": release.record,
        "record_python": release.record_python,
        "record_source": release.record_source,
    }


def render(path: Path, changes: Iterable[Change]) -> str:
    """The text of the VERSIONS.toml at `path` with `changes`, comments and order kept."""
    document = tomlkit.parse(path.read_text("utf-8"))
    releases = document["releases"]
    assert isinstance(releases, Mapping)
    for change in changes:
        *tables, key = change.key.split(".")
        place = reduce(getitem, tables, releases[change.release])
        place[key] = change.new
    # tomlkit sets a new key off from the tables below it.
    below = r'\n\n(\[releases\."[^"]+"\.(?:sdist|aarch64\.wheel)\])'
    return re.sub(below, r"\n\1", tomlkit.dumps(document))


def write(path: Path, changes: Iterable[Change]) -> None:
    """Put `changes` into the VERSIONS.toml at `path`, comments and order kept, atomically.

    Raises:
        OverlayError: it can't be written.
    """
    text = render(path, changes)
    try:
        atomic.put(path, text.encode())
    except OSError as error:
        raise OverlayError(
            f"cannot write {path}",
            error.strerror or str(error),
            "Make its folder writable",
            Exit.ENVIRONMENT,
        ) from error

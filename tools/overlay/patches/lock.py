"""The generated fields of VERSIONS.toml: tree ids and digests, written by an explicit command
only."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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
        if release.is_patched and None in _pins(release).values():
            found += _record(release, record_of(workspace, release))
        if release.is_patched:
            now = {"patched_sha256": None, **{change.key: change.new for change in found}}
            if built := sum_of(workspace, release.model_copy(update=now)):
                found += _sum(release, *built)
        changes += found
        done(release.name)
    return changes


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


def _record(release: Release, digests: tuple[str, str, str]) -> list[Change]:
    pairs = zip(_pins(release).items(), digests, strict=True)
    return [Change(release.name, key, old or "none", new) for (key, old), new in pairs]


def _sum(release: Release, sha256: str, size: int) -> list[Change]:
    return [
        Change(release.name, "patched_sha256", release.patched_sha256 or "none", sha256),
        Change(release.name, "patched_size", release.patched_size or "none", size),
    ]


def render(path: Path, changes: Iterable[Change]) -> str:
    """The text of the VERSIONS.toml at `path` with `changes`, comments and order kept."""
    document = tomlkit.parse(path.read_text("utf-8"))
    releases = document["releases"]
    assert isinstance(releases, Mapping)
    for change in changes:
        releases[change.release][change.key] = change.new
    # tomlkit sets a new key off from the tables below it.
    return re.sub(r'\n\n(\[releases\."[^"]+"\.sdist\])', r"\n\1", tomlkit.dumps(document))


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

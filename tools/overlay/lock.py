"""The generated fields of VERSIONS.toml: tree ids, written by an explicit command only."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import tomlkit

from overlay.errors import Exit, OverlayError
from overlay.tree import UNKNOWN_TREE
from overlay.versions import Release
from overlay.workspace import Workspace


@dataclass(frozen=True)
class Change:
    """One generated field, before and after."""

    release: str
    key: str
    old: str
    new: str

    @property
    def is_change(self) -> bool:
        """Whether the two differ."""
        return self.old != self.new


def compute(workspace: Workspace, releases: Iterable[Release]) -> list[Change]:
    """The tree ids of `releases` as they are now, beside those in VERSIONS.toml.

    Raises:
        OverlayError: a series does not apply.
    """
    changes = []
    for release in releases:
        unpinned = release.model_copy(update={"upstream_tree": UNKNOWN_TREE})
        result = workspace.apply(unpinned).demand()
        base = workspace.store.tree_of(result.base)
        changes.append(Change(release.name, "upstream_tree", release.upstream_tree, base))
        if release.tree is not None:
            changes.append(Change(release.name, "tree", release.tree, result.tree))
    return changes


def render(path: Path, changes: Iterable[Change]) -> str:
    """The text of the VERSIONS.toml at `path` with `changes`, comments and order kept."""
    document = tomlkit.parse(path.read_text("utf-8"))
    releases = document["releases"]
    assert isinstance(releases, Mapping)
    for change in changes:
        releases[change.release][change.key] = change.new
    return tomlkit.dumps(document)


def write(path: Path, changes: Iterable[Change]) -> None:
    """Put `changes` into the VERSIONS.toml at `path`, comments and order kept, atomically."""
    text = render(path, changes)
    try:
        handle, name = tempfile.mkstemp(prefix=".VERSIONS-", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError as error:
        raise OverlayError(
            f"cannot write {path}",
            error.strerror or str(error),
            "Make its folder writable",
            Exit.ENVIRONMENT,
        ) from error
